"""Kill -9 saves in the background and exports at random moments, two at once, and look at what is left each time.

    python benchmarks/kill_writers.py --rounds 100 --json benchmarks/results/kill_writers_cpu_2026-11.json

saves:   two processes save into one folder, each in the background, over and over under a name of its own, while a
         third reads; one or both are killed. Every checkpoint that has a name must be whole, by its checksums, and of
         one step in all tensors; the next save must clear what was left.
exports: two processes export one checkpoint at once, both are killed. Each folder is either absent or the same as that
         of an export that nobody disturbed, and the next export of that name must succeed and leave nothing beside it.
Runs of `train.py` with everything that a run does are benchmarks/kill_rounds.py's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lightning_npu_tp.checkpoint import training_state, writer
from lightning_npu_tp.checkpoint.manifest import Manifest, checkpoints_in, newest_complete, problem, read_manifest
from lightning_npu_tp.checkpoint.peers import Peers
from lightning_npu_tp.checkpoint.saves import Saves
from lightning_npu_tp.tools.commands.inspect_command import look_at
from lightning_npu_tp.tools.testing.models import tiny_config
from lightning_npu_tp.weights.hf_export import export_checkpoint
from lightning_npu_tp.weights.sources import FolderSource

FAMILY = "llama"


def save(path: Path, step: int, weights: dict[str, torch.Tensor] | None = None) -> None:
    """A checkpoint of about a megabyte, all of whose values are its step; or of these weights."""
    given = weights or {f"w{number}": torch.full((256, 256), float(step)) for number in range(4)}
    content = {"state_dict": given, "global_step": step, "epoch": 0}
    if weights is not None:
        config = tiny_config(FAMILY).to_diff_dict()
        content["hyper_parameters"] = {"architecture": FAMILY, "config": config}
    tensors, rest = training_state.split(content)
    whole = writer.serialized(rest)
    writer.save_folder(tensors, whole, writer.serialized({}), path, Manifest(step=step), Peers())


def started(work: Callable[[], object]) -> int:
    """Run it in a process of its own; returns its number."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def kill(pids: list[int]) -> int:
    """Kill -9 them all; returns how many were still at it."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return sum(os.waitpid(pid, 0)[1] == signal.SIGKILL for pid in pids)


def save_for_ever(folder: Path, name: str, first: int) -> None:
    saves = Saves(stop=True)
    for step in range(first, 10**9):
        path = folder / f"{name}-last.ckpt"
        saves.run(path, lambda path=path, step=step: save(path, step), background=True)


def read_for_ever(folder: Path, failures: Path) -> None:
    while True:
        for path in checkpoints_in(folder):
            if found := look_at(path, checksums=True).problems:
                failures.write_text("; ".join(found))


def rounds_of_saves(number: int, rng: random.Random, place: Path) -> dict[str, Any]:
    folder, failures = place / "checkpoints", place / "failures"
    folder.mkdir()
    wrong: list[str] = []
    counts: Counter[str] = Counter()
    step = 1
    for round_ in range(number):
        writers = [started(lambda name=name, step=step: save_for_ever(folder, name, step)) for name in "ab"]
        reader = started(lambda: read_for_ever(folder, failures))
        time.sleep(rng.uniform(0.0, 0.5))
        both = rng.random() < 0.5
        counts["killed"] += kill(writers if both else writers[:1])
        # The other goes on beside what was left, and clears none of what is not its own.
        time.sleep(rng.uniform(0.0, 0.2))
        counts["killed"] += 0 if both else kill(writers[1:])
        kill([reader])
        left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        counts["left_partial"] += sum(".partial-" in name for name in left)
        counts["left_replaced"] += sum(".previous-" in name for name in left)
        for path in checkpoints_in(folder):
            if found := problem(path, checksums=True):
                wrong.append(f"round {round_}: {found}")
                continue
            saved, source = read_manifest(path).step, FolderSource(path)
            values = {float(v) for n in source.shapes for v in source.read(n, ((0, 256), (0, 256))).unique()}
            if values != {float(saved)}:
                wrong.append(f"round {round_}: {path.name} of step {saved} holds values of {sorted(values)[:5]}")
            counts["compared"] += 1
            step = max(step, saved)
        newest = newest_complete(folder, checksums=True)
        step += 1
        save(folder / "c.ckpt", step)
        if rest := [path.name for path in folder.iterdir() if path.name.startswith(".")]:
            wrong.append(f"round {round_}: the next save leaves {rest}")
        counts["rounds_with_a_checkpoint"] += newest is not None
    if failures.exists():
        wrong.append(f"a reader was told: {failures.read_text()[:500]}")
    return dict(counts) | {"wrong": wrong}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rounds_of_exports(number: int, rng: random.Random, place: Path) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_config(tiny_config(FAMILY))
    save(place / "c.ckpt", 3, {f"model.{name}": value for name, value in model.state_dict().items()})

    def export(name: str) -> None:
        export_checkpoint(place / "c.ckpt", place / name, with_tokenizer=False)

    export("undisturbed")
    begun = time.monotonic()
    export("again")
    # The two share a machine, so that each takes longer than one alone.
    longest = 1.5 * (time.monotonic() - begun)
    wanted = content(place / "undisturbed")
    wrong: list[str] = []
    counts: Counter[str] = Counter()
    for round_ in range(number):
        pids = [started(lambda name=name: export(name)) for name in ("one", "two")]
        time.sleep(rng.uniform(0.0, longest))
        counts["killed"] += kill(pids)
        counts["left_beside"] += sum(path.name.startswith(".") for path in place.iterdir())
        for name in ("one", "two"):
            if (place / name).exists():
                counts["complete"] += 1
                if content(place / name) != wanted:
                    wrong.append(f"round {round_}: {name} is not what an undisturbed export writes")
                shutil.rmtree(place / name)
            if round_ % 5 == 0:
                export(name)
                if content(place / name) != wanted:
                    wrong.append(f"round {round_}: the next export of {name} is another")
                shutil.rmtree(place / name)
        if round_ % 5 == 0:
            # Locks of dead readers go with the next save beside the checkpoint.
            save(place / "d.ckpt", 1)
            if rest := [path.name for path in place.iterdir() if path.name.startswith(".")]:
                wrong.append(f"round {round_}: left beside: {rest}")
    return dict(counts) | {"wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rng, result = random.Random(given.seed), dict[str, Any]()
    for name, run in (("saves", rounds_of_saves), ("exports", rounds_of_exports)):
        place = Path(tempfile.mkdtemp())
        try:
            result[name] = {"rounds": given.rounds} | run(given.rounds, rng, place)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    result |= {
        "date": str(date.today()),
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, torch {torch.__version__}",
        "command": "python benchmarks/kill_writers.py " + " ".join(sys.argv[1:]),
    }
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    raise SystemExit(any(result[name]["wrong"] for name in ("saves", "exports")))


if __name__ == "__main__":
    main()
