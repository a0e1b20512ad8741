"""What the libraries of the pinned torch_npu want of CANN, read from the wheel, against what the simulator provides.

Catches a symbol that a new release asks for: the loader would name it only on the machine of whoever upgrades.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from ascend_sim import elf, hook

TORCH_NPU = Path(importlib.util.find_spec("torch_npu").origin).parent  # type: ignore[union-attr, arg-type]
# ATB, a library of its own for inference, which is not simulated; libop_plugin_atb.so is loaded when it is first used.
LEFT_OUT = {"libop_plugin_atb.so"}


def libraries() -> list[Path]:
    return sorted(path for path in [*TORCH_NPU.glob("lib/lib*.so"), *TORCH_NPU.glob("_C*.so")])


def provided_by_the_system() -> set[str]:
    """What the other needed libraries define: torch's, and those of the C and C++ runtime that this process has."""
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if ".so" in line}
    ours = os.environ[hook.LIBRARIES]
    found: set[str] = set()
    for path in {*loaded, *map(str, Path(torch.__file__).parent.glob("lib/*.so"))}:
        if not path.startswith(ours) and os.path.exists(path):
            found |= elf.symbols(Path(path)).defined
    return found


def test_every_symbol_that_torch_npu_needs_is_provided() -> None:
    wanted: dict[str, str] = {}
    for path in libraries():
        if path.name not in LEFT_OUT:
            wanted.update({name: path.name for name in elf.symbols(path).undefined})
    ours: set[str] = set()
    for path in Path(os.environ[hook.LIBRARIES]).glob("lib*.so"):
        ours |= elf.symbols(path).defined
    assert len(wanted.keys() & ours) > 80, "the tables were not read"
    # Python's own come with the interpreter, which may be linked statically.
    missing = {name for name in wanted.keys() - ours - provided_by_the_system() if not name.startswith(("Py", "_Py"))}
    assert not missing


def test_every_library_that_torch_npu_needs_of_cann_is_there() -> None:
    ours = {elf.symbols(path).soname for path in Path(os.environ[hook.LIBRARIES]).glob("lib*.so")}
    needed = {name for path in libraries() if path.name not in LEFT_OUT for name in elf.symbols(path).needed}
    cann = {"libhccl.so", "libascendcl.so", "libacl_op_compiler.so", "libge_runner.so", "libgraph.so"}
    assert cann <= needed and cann | {"libacl_tdt_channel.so", "libopapi.so"} <= ours


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no library")
    with pytest.raises(ValueError, match="ELF"):
        elf.symbols(tmp_path / "text")
