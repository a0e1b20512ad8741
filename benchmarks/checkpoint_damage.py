"""Damage a training checkpoint in every way that a disk or a copy does, and count what a load notices.

    python benchmarks/checkpoint_damage.py --flips 200 --json benchmarks/results/checkpoint_damage_cpu_2026-11.json

Saves a small model sharded over two ranks, with optimizer state, and as one file. Then, one at a time and each undone
afterwards: every file is cut (to nothing, inside its header, inside the first tensor, by its last byte) or removed, and
single bytes of all files are changed. Noticed means that opening for a load raises CheckpointError naming the file.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_npu_tp.checkpoint import training_state, writer
from lightning_npu_tp.checkpoint.manifest import Manifest
from lightning_npu_tp.checkpoint.peers import Peers
from lightning_npu_tp.checkpoint.reader import open_checkpoint
from lightning_npu_tp.errors import CheckpointError
from lightning_npu_tp.tools.testing.ranks import run_ranks


def write_checkpoints(rank: int, world_size: int, folder: str) -> None:
    """A sharded checkpoint and a one-file checkpoint of one small model."""
    mesh = init_device_mesh("cpu", (world_size,))
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    for layer in model:
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
        layer.bias = nn.Parameter(distribute_tensor(layer.bias.detach(), mesh, [Shard(0)]))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def state(full: bool) -> dict[str, Any]:
        return {
            "epoch": 1,
            "global_step": 3,
            "state_dict": training_state.model_state(model, full=full),
            "optimizer_states": [training_state.optimizer_state(model, optimizer, full=full)],
        }

    training_state.save_sharded(state(False), Path(folder) / "sharded.ckpt", is_main=rank == 0)
    writer.save_file(state(True), {"rank": rank}, Path(folder) / "file.ckpt", Manifest(), Peers())


def damages(path: Path, flips: int, chosen: random.Random) -> Iterator[tuple[str, Path, bytes | None]]:
    """(kind, file, content after the damage), None for a file that is gone."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        content = file.read_bytes()
        yield "cut to nothing", file, b""
        yield "cut in the header", file, content[: min(10, len(content) // 2)]
        yield "cut in the first tensor", file, content[: len(content) // 3]
        yield "last byte gone", file, content[:-1]
        yield "one byte more", file, content + b"\0"
        if path.is_dir():
            yield "file gone", file, None
    for number in range(flips):
        # Every file in turn, so that the small ones are met as often as the large ones.
        file = files[number % len(files)]
        content = bytearray(file.read_bytes())
        content[chosen.randrange(len(content))] ^= chosen.randrange(1, 256)
        yield "byte changed", file, bytes(content)


def count_noticed(path: Path, flips: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """How many damages of each kind were tried, and those that nothing noticed, or that named no file."""
    open_checkpoint(path, Peers(), checksums=True)
    tried: Counter[str] = Counter()
    missed = []
    for kind, file, content in damages(path, flips, random.Random(seed)):
        before = file.read_bytes()
        tried[kind] += 1
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        try:
            open_checkpoint(path, Peers(), checksums=True)
            missed.append(f"{kind}: {file.name} was loaded")
        except CheckpointError as error:
            if file.name not in str(error):
                missed.append(f"{kind}: {file.name} is not named: {error}")
        finally:
            file.write_bytes(before)
    open_checkpoint(path, Peers(), checksums=True)
    return tried, missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=200, help="bytes to change, per checkpoint")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(write_checkpoints, 2, folder)
        for name in ("sharded.ckpt", "file.ckpt"):
            path = Path(folder) / name
            files = sorted(file.name for file in path.iterdir()) if path.is_dir() else [name]
            tried, missed = count_noticed(path, arguments.flips)
            total = sum(tried.values())
            print(f"{name}: {total - len(missed)} of {total} noticed, the file named ({dict(tried)})")
            results[name] = {"files": files, "tried": dict(tried), "noticed": total - len(missed), "missed": missed}
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "command": " ".join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "results": results,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(1 if any(result["missed"] for result in results.values()) else 0)


if __name__ == "__main__":
    main()
