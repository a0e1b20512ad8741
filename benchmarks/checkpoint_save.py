"""How long training waits for a checkpoint: saved at once, saved in the background, and a raw write of the same bytes.

    python benchmarks/checkpoint_save.py --megabytes 1000 --json benchmarks/results/checkpoint_save_cpu_2026-11.json

Two ranks (gloo) hold weights and AdamW states as shards and save them as a training run does: temporary folder,
checksums, fsync, manifest, rename. The raw write is one file per rank in blocks of 8 MB, with fsync, at the same time.
Every number is the slower rank's; rounds alternate, and the median counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_npu_tp.checkpoint import training_state, writer
from lightning_npu_tp.checkpoint.files import delete
from lightning_npu_tp.checkpoint.manifest import Manifest, read_manifest
from lightning_npu_tp.checkpoint.peers import Peers
from lightning_npu_tp.checkpoint.reader import open_checkpoint
from lightning_npu_tp.checkpoint.saves import Saves
from lightning_npu_tp.tools.testing.ranks import run_ranks

_BLOCK = 8 << 20
_SIDE = 1024


def sharded_model(megabytes: int, world_size: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Weights and AdamW states of about so many megabytes, float32, rows over the ranks."""
    mesh = init_device_mesh("cpu", (world_size,))
    layers = max(1, round(megabytes * 1e6 / 3 / (4 * _SIDE * _SIDE)))
    model = nn.Sequential(*(nn.Linear(_SIDE, _SIDE, bias=False) for _ in range(layers)))
    for layer in model:
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def slowest(work: Callable[[], Any]) -> float:
    """Seconds of the slower rank."""
    dist.barrier()
    start = time.perf_counter()
    work()
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def measure(rank: int, world_size: int, folder: str, megabytes: int, rounds: int) -> dict[str, Any]:
    model, optimizer = sharded_model(megabytes, world_size)
    path, background = Path(folder) / "a.ckpt", Peers(dist.new_group(backend="gloo"))
    saves = Saves(stop=True)

    def prepared(peers: Peers, copy: bool) -> Callable[[], None]:
        state = {
            "state_dict": training_state.model_state(model),
            "optimizer_states": [training_state.optimizer_state(model, optimizer)],
        }
        if copy:
            state = training_state.detached(state, model, [optimizer])
        tensors, rest = training_state.split(state)
        content = writer.serialized(rest)
        return lambda: writer.save_folder(tensors, content, content, path, Manifest(), peers)

    def raw() -> None:
        content = memoryview(bytes(_BLOCK))
        left = sum(entry["bytes"] for entry in read_manifest(path).files.values()) // world_size
        with open(Path(folder) / f"raw_{rank}", "wb", buffering=0) as stream:
            while left > 0:
                left -= stream.write(content[: min(_BLOCK, left)])
            os.fsync(stream.fileno())

    times: dict[str, list[float]] = {"at_once": [], "raw_write": [], "wait_in_background": [], "until_complete": []}
    times["verify"] = []
    for _ in range(rounds):
        times["at_once"].append(slowest(lambda: saves.run(path, prepared(Peers(), False), background=False)))
        times["raw_write"].append(slowest(raw))
        start = time.perf_counter()
        begin = slowest(lambda: saves.run(path, prepared(background, True), background=True))
        times["wait_in_background"].append(begin)
        saves.wait()
        dist.barrier()
        times["until_complete"].append(time.perf_counter() - start)
        times["verify"].append(slowest(lambda: open_checkpoint(path, Peers(), checksums=True)))
    size = sum(entry["bytes"] for entry in read_manifest(path).files.values())
    dist.barrier()
    if rank == 0:
        delete(path)
    return {"bytes": size, "seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="of weights and optimizer states together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary folder by default")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = run_ranks(measure, 2, folder, arguments.megabytes, arguments.rounds, timeout=900)[0]
    median = {name: round(statistics.median(values), 3) for name, values in found["seconds"].items()}
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 2 ranks on cpu",
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "bytes": found["bytes"],
        "median_seconds": median,
        "at_once_over_raw_write": round(median["at_once"] / median["raw_write"], 2),
        "wait_in_background_over_at_once": round(median["wait_in_background"] / median["at_once"], 3),
        "all_seconds": {name: [round(value, 3) for value in values] for name, values in found["seconds"].items()},
    }
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
