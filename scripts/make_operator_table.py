"""Write lightning_npu_tp/tools/operators/torch_npu_2.13.txt from the torch and torch_npu that are installed.

    TORCH_DEVICE_BACKEND_AUTOLOAD=0 python scripts/make_operator_table.py [--check]

Needs neither CANN nor a card and does not import torch_npu: the kernels that it has are listed in
torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml; which operator torch would build from others, and what it
would call for that, torch's dispatcher and its native_functions.yaml say. --check compares and writes nothing.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import torch
import yaml

from lightning_npu_tp.tools import operators

_KERNELS = "csrc/aten/npu_native_functions_by_codegen.yaml"
_TORCH = "packaged/ATen/native/native_functions.yaml"


def package_folder(name: str) -> Path:
    """Where a package is installed, without importing it. Exits with 2 where it is not."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"error: {name} is not installed beside this Python. Install the npu extra: pip install -e '.[npu]'")
    return Path(spec.submodule_search_locations[0])


def _name(entry: str | dict[str, Any]) -> str:
    signature = entry if isinstance(entry, str) else entry["func"]
    return signature.split("(")[0].strip()


def make_table() -> operators.OperatorTable:
    """The table of what is installed."""
    wheel = yaml.safe_load((package_folder("torch_npu") / _KERNELS).read_text(encoding="utf-8"))
    native = {f"aten::{_name(entry)}" for entry in wheel["supported"]}
    declared = yaml.safe_load((package_folder("torchgen") / _TORCH).read_text(encoding="utf-8"))
    delegates = {
        f"aten::{_name(entry)}": f"aten::{entry['structured_delegate']}"
        for entry in declared
        if "structured_delegate" in entry
    }
    own = {_name(entry) for entry in wheel["custom"]}
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")}
    # Where something has imported torch_npu, its own operators are among them.
    names -= {f"aten::{name}" for name in own}
    classes = {name: operators.classify(name, native, delegates) for name in names}
    # Two of the list are no operators of torch.
    own |= {name.removeprefix("aten::") for name in native - names}
    classes |= {f"npu::{name}": "custom" for name in own}
    return operators.OperatorTable(torch.__version__.split("+")[0], version("torch_npu"), classes)


def main() -> None:
    """Write or compare."""
    target = Path(operators.__file__).with_name(operators.TABLE)
    text = make_table().as_text()
    if "--check" in sys.argv[1:]:
        if target.read_text(encoding="utf-8") != text:
            sys.exit(f"error: {target} is not what the installed wheels say. Run this script without --check.")
        print(f"{target.name} is what the installed wheels say")
        return
    target.write_text(text, encoding="utf-8")
    counts = {
        kind: sum(found == kind for found in operators.parse(text).classes.values()) for kind in operators.CLASSES
    }
    print(f"{target}: {', '.join(f'{number} {kind}' for kind, number in counts.items())}")


if __name__ == "__main__":
    main()
