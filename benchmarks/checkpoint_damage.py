"""Damage a training checkpoint in every way that a disk or a copy does, and count what a load notices.

    python benchmarks/checkpoint_damage.py --flips 200 --json benchmarks/results/checkpoint_damage_cpu_2026-11.json

Saves a small model sharded over two ranks, with optimizer state. Then, one at a time and each undone
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

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_npu_tp.checkpoint import training_state
from lightning_npu_tp.checkpoint.peers import Peers
from lightning_npu_tp.checkpoint.reader import open_checkpoint
from lightning_npu_tp.errors import CheckpointError
from lightning_npu_tp.tools.testing.ranks import run_ranks


def write_checkpoint(rank: int, world_size: int, folder: str) -> None:
    """A sharded checkpoint of a small model."""
    mesh = init_device_mesh("cpu", (world_size,))
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    for layer in model:
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
        layer.bias = nn.Parameter(distribute_tensor(layer.bias.detach(), mesh, [Shard(0)]))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    state = {
        "epoch": 1,
        "global_step": 3,
        "state_dict": training_state.model_state(model),
        "optimizer_states": [training_state.optimizer_state(model, optimizer)],
    }
    training_state.save_sharded(state, Path(folder) / "sharded.ckpt", is_main=rank == 0)


def damages(path: Path, flips: int, chosen: random.Random) -> Iterator[tuple[str, Path, bytes | None]]:
    """(kind, file, content after the damage), None for a file that is gone."""
    files = sorted(path.iterdir())
    for file in files:
        content = file.read_bytes()
        yield "cut to nothing", file, b""
        yield "cut in the header", file, content[: min(10, len(content) // 2)]
        yield "cut in the first tensor", file, content[: len(content) // 3]
        yield "last byte gone", file, content[:-1]
        yield "one byte more", file, content + b"\0"
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
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(write_checkpoint, 2, folder)
        path = Path(folder) / "sharded.ckpt"
        files = sorted(file.name for file in path.iterdir())
        tried, missed = count_noticed(path, arguments.flips)
    total = sum(tried.values())
    print(f"{path.name}: {total - len(missed)} of {total} noticed, the file named ({dict(tried)})")
    result = {"files": files, "tried": dict(tried), "noticed": total - len(missed), "missed": missed}
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "command": " ".join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "results": {path.name: result},
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
