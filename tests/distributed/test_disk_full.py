"""A disk that is truly full while a checkpoint is saved: a small tmpfs. `pytest tests/distributed/test_disk_full.py`

Catches a good checkpoint that is lost with the one that did not fit, a rank that hangs, what is left of a save that
failed, and an error that does not say how much is missing. Files that cannot grow, with every option, are in
test_checkpoints_saving.py; mounting needs root.
"""

from __future__ import annotations

import re
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_checkpoints_saving import checkpoints, names, strategy
from test_strategy import WORLD, Module, data, trainer

from lightning_npu_tp.checkpoint import writer
from lightning_npu_tp.checkpoint.manifest import newest_complete, verify
from lightning_npu_tp.errors import CheckpointError

# One checkpoint of the model takes 1.6 MB; the second finds no room beside it.
SIZE = 2 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", place], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here, which takes root: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def fill_it(rank: int, world: int, folder: str, setting: str, foreseen: bool) -> dict[str, Any]:
    free = writer.shutil.disk_usage
    if not foreseen:
        # Somebody else fills it after the check, which comes before the first byte: the write itself fails.
        def then(path: Path) -> Any:
            return free(path) if any(path.glob(".*.partial-*")) else free(path)._replace(free=1 << 40)

        writer.shutil.disk_usage = then
    module, error = Module(), ""
    run = trainer(strategy(on_save_error=setting), callbacks=[checkpoints(folder)], enable_checkpointing=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.fit(module, data())
    except CheckpointError as raised:
        error = str(raised)
    finally:
        writer.shutil.disk_usage = free
    return {"error": error, "said": [str(warning.message) for warning in caught], "steps": len(module.losses)}


@pytest.mark.parametrize("foreseen", [True, False], ids=["foreseen", "while writing"])
@pytest.mark.parametrize("setting", ["stop", "continue"])
def test_a_full_disk(on_ranks: Any, small_disk: Path, setting: str, foreseen: bool) -> None:
    found = on_ranks(fill_it, WORLD, str(small_disk), setting, foreseen, backend=None)
    assert [one["steps"] for one in found] == [2 if setting == "stop" else 4] * WORLD
    assert len({one["error"] for one in found}) == 1
    told = found[0]["error"] if setting == "stop" else "\n".join(found[0]["said"])
    assert re.search(r"step=2\.ckpt could not be saved: .*t needs 1\.\d MB, and [\d.]+ (kB|bytes) are free", told), told
    if setting == "continue":
        assert told.count("The run goes on without a checkpoint") == 3
    # Neither the good one is harmed nor is there anything of the others.
    assert names(small_disk) == ["step=1.ckpt"] and verify(small_disk / "step=1.ckpt") == []
    assert newest_complete(small_disk, checksums=True) == small_disk / "step=1.ckpt"
