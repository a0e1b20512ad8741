"""Load a synthetic checkpoint of several GB into four tensor ranks: memory, bytes, time beside dd and transformers.

    python benchmarks/load_weights.py --gigabytes 4.3 --json benchmarks/results/load_weights_cpu_2026-11.json

DeepSeek-V2-Lite's shapes with fewer layers, bfloat16, in files of about 1 GB. Files are read once before, so that all
contestants read from the page cache. dd: as many processes as ranks at a time, together the same bytes, into a buffer
of 4 MiB that each uses again and again. dd_into_memory: the same dd into files on a tmpfs, which is memory that nobody
has touched, as a shard's is (null where it would not fit). plain: the same with preadv into fresh memory of that size,
which is what any loader has to do. Memory is the peak of a rank's anonymous memory (mapped files are not in it) above
its own shard.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_npu_tp import weights_from
from lightning_npu_tp.convert.convert import conversion_of, convert
from lightning_npu_tp.kernels import select
from lightning_npu_tp.models.families.registry import family_named
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes
from lightning_npu_tp.tools.testing.ranks import run_ranks
from lightning_npu_tp.weights.safetensors_reader import open_folder

CONFIG = Path(__file__).parents[1] / "conf/model/deepseek_v2_lite.yaml"
TENSOR = 4


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """Samples this process's anonymous memory until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.value, self.running = anonymous_bytes(), True
        self.start()

    def run(self) -> None:
        while self.running:
            self.value = max(self.value, anonymous_bytes())
            time.sleep(0.002)


def write_checkpoint(folder: Path, gigabytes: float) -> Any:
    """Random weights in the published names; returns the config."""
    values = yaml.safe_load(CONFIG.read_text())["config"]
    values["num_hidden_layers"] = 2
    while True:
        config = AutoConfig.for_model("deepseek_v2", **values)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        if sum(p.numel() for p in model.parameters()) * 2 >= gigabytes * 1e9:
            break
        values["num_hidden_layers"] += 1
    folder.mkdir(parents=True)
    config.dtype = "bfloat16"
    config.architectures = ["DeepseekV2ForCausalLM"]
    config.save_pretrained(folder)
    table = family_named("deepseek_v2").keys(config)
    pieces = [piece for name, p in model.named_parameters() for piece in table.pieces(name, tuple(p.shape))]
    where: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))
        tensors.clear()

    size = 0
    for piece in pieces:
        tensors[piece.key] = torch.empty(piece.shape, dtype=torch.bfloat16).normal_(std=0.02)
        size += tensors[piece.key].nbytes
        if size > 1e9:
            flush()
            size = 0
    if tensors:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return config


def load(rank: int, world: int, folder: str) -> dict[str, float]:
    torch.set_num_threads(1)
    meshes = Meshes.build(Layout.resolve(world=world, data=1, tensor=world), "cpu")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    weights_from(model, folder)
    torch.distributed.barrier()
    before, peak = anonymous_bytes(), Peak()
    convert(
        model,
        meshes=meshes,
        groups=Groups(meshes),
        kernels=select("cpu", {}),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        seed=0,
    )
    peak.running = False
    peak.join()
    report = conversion_of(model)
    assert report is not None and report.loaded is not None
    locals_ = [parameter.to_local() for parameter in model.parameters()]
    return {
        "seconds": report.loaded.seconds,
        "bytes_read": report.loaded.bytes,
        "shard_bytes": sum(t.nbytes for t in locals_),
        "largest_slice_bytes": max(t.nbytes for t in locals_),
        "peak_above_shard_bytes": peak.value - before - sum(t.nbytes for t in locals_),
    }


def from_pretrained(rank: int, world: int, folder: str) -> float:
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    # Its weights may still be pages of the file: a sum reads them.
    sum(float(p.view(torch.int16).flatten()[::2048].sum()) for p in model.parameters())
    return time.perf_counter() - begin


def plain(rank: int, world: int, folder: str, nbytes: int) -> float:
    """Seconds to read so many bytes, a rank's share of the files one after the other, into fresh memory."""
    torch.distributed.barrier()
    begin = time.perf_counter()
    memory = memoryview(torch.empty(nbytes, dtype=torch.uint8).numpy())  # type: ignore[arg-type]
    files = sorted(Path(folder).glob("*.safetensors"))
    # A small checkpoint has fewer files than there are ranks.
    first, done = rank % len(files), 0
    while done < nbytes:
        for file in files[first:]:
            descriptor, offset = os.open(file, os.O_RDONLY), 0
            while done < nbytes and (count := os.preadv(descriptor, [memory[done : done + (1 << 26)]], offset)):
                done, offset = done + count, offset + count
            os.close(descriptor)
    return time.perf_counter() - begin


MEMORY = Path("/dev/shm")


def dd_into_memory(folder: Path, nbytes: int) -> float | None:
    """The same into files on a tmpfs, which are memory that nobody has touched; None where there is no room."""
    available = psutil.virtual_memory().available
    if not MEMORY.is_dir() or min(available, shutil.disk_usage(MEMORY).free) < 1.25 * nbytes:
        return None
    place = Path(tempfile.mkdtemp(dir=MEMORY, prefix="load_weights_"))
    try:
        return dd(folder, nbytes, into=place)
    finally:
        shutil.rmtree(place)


def dd(folder: Path, nbytes: int, into: Path | None = None) -> float:
    """Seconds until `TENSOR` processes have together read so many bytes of the files.

    into: a folder to copy them to; otherwise to /dev/null, where dd's one buffer is used again and again.
    """
    files = sorted(folder.glob("*.safetensors"))
    each = nbytes // TENSOR
    begin = time.perf_counter()
    running = []
    for rank in range(TENSOR):
        # Each reads its quarter; what is replicated is read by each, hence a little more than the files.
        skip = rank * (sum(f.stat().st_size for f in files) - each) // max(TENSOR - 1, 1)
        running += read_range(files, skip, each, None if into is None else into / str(rank))
    for process in running:
        process.wait()
    return time.perf_counter() - begin


def read_range(files: list[Path], start: int, count: int, into: Path | None = None) -> list[subprocess.Popen[bytes]]:
    """One shell that runs dd over the parts of the files that lie in the range, one after the other."""
    parts = []
    for file in files:
        size = file.stat().st_size
        first, last = max(start, 0), min(start + count, size)
        if first < last:
            flags = f"bs=4M iflag=skip_bytes,count_bytes skip={first} count={last - first} status=none"
            target = "/dev/null" if into is None else f"{into} oflag=append conv=notrunc"
            parts.append(f"dd if={file} of={target} {flags}")
        start -= size
    return [subprocess.Popen(["sh", "-c", "; ".join(parts)])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write the checkpoint; a temporary folder by default")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    place = given.folder or Path(tempfile.mkdtemp())
    folder = place / "model"
    try:
        write_checkpoint(folder, given.gigabytes)
        size = open_folder(folder).nbytes
        measure(given, folder, size)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(given: argparse.Namespace, folder: Path, size: int) -> None:
    dd(folder, size)
    rounds: dict[str, list[Any]] = {name: [] for name in ("ours", "dd", "dd_into_memory", "plain", "transformers")}
    contestants: dict[str, Callable[[], Any]] = {
        "ours": lambda: run_ranks(load, TENSOR, str(folder), timeout=600),
        "dd": lambda: dd(folder, sum(rank["bytes_read"] for rank in rounds["ours"][-1])),
        # One after the other: the copy is gone before the next begins.
        "dd_into_memory": lambda: dd_into_memory(folder, sum(rank["bytes_read"] for rank in rounds["ours"][-1])),
        "plain": lambda: max(
            run_ranks(plain, TENSOR, str(folder), int(rounds["ours"][-1][0]["bytes_read"]), timeout=600)
        ),
        "transformers": lambda: run_ranks(from_pretrained, 1, str(folder), timeout=600, backend=None)[0],
    }
    for _ in range(given.repeats):
        for name, run in contestants.items():
            rounds[name].append(run())
    ranks = rounds["ours"][-1]
    seconds = [max(rank["seconds"] for rank in one) for one in rounds["ours"]]
    replicated = sum(rank["shard_bytes"] for rank in ranks)
    over = [rank["peak_above_shard_bytes"] - rank["largest_slice_bytes"] for one in rounds["ours"] for rank in one]
    result = {
        "checkpoint_bytes": size,
        "bytes_read_over_needed": sum(rank["bytes_read"] for rank in ranks) / replicated,
        "bytes_read_over_checkpoint": sum(rank["bytes_read"] for rank in ranks) / size,
        "largest_slice_mib": max(rank["largest_slice_bytes"] for rank in ranks) / 2**20,
        "worst_memory_above_shard_mib": max(r["peak_above_shard_bytes"] for one in rounds["ours"] for r in one) / 2**20,
        "worst_memory_above_shard_and_largest_slice_mib": max(over) / 2**20,
        "seconds": seconds,
        "dd_seconds": rounds["dd"],
        "dd_into_memory_seconds": rounds["dd_into_memory"],
        "fresh_memory_seconds": rounds["plain"],
        "from_pretrained_seconds_one_process": rounds["transformers"],
        "median_over_dd": median(seconds) / median(rounds["dd"]),
        "median_over_dd_into_memory": None
        if None in rounds["dd_into_memory"]
        else median(seconds) / median(rounds["dd_into_memory"]),
        "median_over_fresh_memory": median(seconds) / median(rounds["plain"]),
        "date": str(date.today()),
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, torch {torch.__version__}",
        "command": "python benchmarks/load_weights.py " + " ".join(sys.argv[1:]),
    }
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
