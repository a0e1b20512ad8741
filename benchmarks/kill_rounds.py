"""Kill -9 a random process of a run at a random moment, again and again, go on with resume=auto, compare the end.

    python benchmarks/kill_rounds.py --rounds 50 --json benchmarks/results/kill_rounds_cpu_2026-11.json

`train.py` on two ranks with a checkpoint after every second step, so that many kills meet a save. A round starts the
run in its folder, waits a random time, kills the parent or the second rank, and waits until no process of the run is
left. The last life runs to its end. Weights and logged losses, of training and of validation, must be bit for bit those
of a run that was never killed, no row may be logged twice, and every life that got so far must have gone on from the
newest checkpoint that was complete when it began. Every other validation falls on a step that is saved just before it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

from lightning_npu_tp.checkpoint.manifest import newest_complete, read_manifest
from lightning_npu_tp.weights.sources import FolderSource
from lit_models.run.continued import points

ROOT = Path(__file__).parents[1]
SMALL = (
    "trainer.devices=2 data.max_tokens=20000 data.max_val_tokens=600 data.sequence_length=32 data.batch_size=2 "
    "validate_before=false trainer.val_check_interval=7 trainer.limit_val_batches=2 scheduler=constant logger=csv "
    "callbacks.checkpoint.every_n_train_steps=2 "
    "callbacks.progress=null callbacks.loss_curve=null resume=auto"
).split()


def command(folder: Path, steps: int, more: list[str]) -> list[str]:
    return [sys.executable, "train.py", f"hydra.run.dir={folder}", f"trainer.max_steps={steps}", *SMALL, *more]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    newest = newest_complete(folder / "checkpoints", checksums=True)
    assert newest is not None, f"no checkpoint in {folder}"
    source = FolderSource(newest)
    return {name: source.read(name, tuple((0, size) for size in shape)) for name, shape in source.shapes.items()}


def repeated_rows(path: Path) -> list[str]:
    """Rows of a metrics.csv that are there twice: the same step and the same metrics, whatever their values."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(row["step"], *(name for name, value in row.items() if value)) for row in csv.DictReader(file)]
    return [" ".join(row) for row, times in Counter(rows).items() if times > 1]


def life(folder: Path, steps: int, more: list[str], rng: random.Random, longest: float) -> dict[str, Any]:
    """One start; killed at a random moment unless it ends before."""
    before = newest_complete(folder / "checkpoints")
    newest = None if before is None else read_manifest(before).step
    with tempfile.TemporaryFile("w+") as told:
        run = subprocess.Popen(
            command(folder, steps, more), cwd=ROOT, stdout=told, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        parent = psutil.Process(run.pid)
        deadline = time.monotonic() + rng.uniform(min(4.0, longest / 2), longest)
        while run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        victim, family = None, []
        if run.poll() is None:
            family = parent.children(recursive=True)
            victim = rng.choice([parent, *family])
            try:
                os.kill(victim.pid, signal.SIGKILL)
            except ProcessLookupError:
                victim = None
        run.wait(120)
        _, alive = psutil.wait_procs(family, timeout=60)
        told.seek(0)
        text = told.read()
    found = re.search(r"Going on from (\S+)\.\n", text)
    return {
        "code": run.returncode,
        "killed": None if victim is None else ("parent" if victim.pid == run.pid else "child"),
        "newest_before": newest,
        "went_on_from": None if found is None else Path(found[1]).name,
        "began": found is not None or "No complete checkpoint yet" in text,
        "left": len(alive),
        "text": text,
        "newest_name": None if before is None else before.name,
    }


def rounds(number: int, steps: int, longest: float, seed: int, place: Path, more: list[str]) -> dict[str, Any]:
    rng = random.Random(seed)
    straight, killed = place / "straight", place / "killed"
    done = subprocess.run(command(straight, steps, []), cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    lives, kills, wrong = [], 0, []
    while True:
        one = life(killed, steps, more, rng, longest if kills < number else 900.0)
        lives.append(one)
        kills += one["killed"] is not None
        if one["left"]:
            wrong.append(f"{one['left']} processes left after a kill")
        if one["newest_name"] is not None and one["began"] and one["went_on_from"] != one["newest_name"]:
            wrong.append(f"went on from {one['went_on_from']} and not from {one['newest_name']}")
        if one["killed"] is None:
            if one["code"] != 0:
                wrong.append(one["text"][-2000:])
            break
    same = {name: value for name, value in tensors(killed).items()}
    wanted = tensors(straight)
    differing = [name for name in wanted if name not in same or not torch.equal(wanted[name], same[name])]
    losses = {
        key: [points(folder / "metrics.csv", key) for folder in (straight, killed)]
        for key in ("train/loss", "val/loss")
    }
    unlike = {key: sorted(set(one) ^ set(other)) for key, (one, other) in losses.items()}
    equal = all(one == other for one, other in losses.values())
    return {
        "kills": kills,
        "of_the_parent": sum(one["killed"] == "parent" for one in lives),
        "before_training": sum(one["killed"] is not None and not one["began"] for one in lives),
        "went_on": sum(one["went_on_from"] is not None for one in lives),
        "left_partial_or_replaced": len([p for p in (killed / "checkpoints").iterdir() if p.name.startswith(".")]),
        "wrong": wrong,
        "tensors_compared": len(wanted),
        "tensors_that_differ": differing,
        "losses_equal": equal and len(losses["train/loss"][0]) == steps and len(losses["val/loss"][0]) > 0,
        "rows_compared": {key: len(one) for key, (one, _) in losses.items()},
        "losses_that_differ": {key: values[:20] for key, values in unlike.items()},
        "rows_twice": repeated_rows(killed / "metrics.csv"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of the run")
    parser.add_argument("--longest", type=float, default=14.0, help="seconds that a killed life may last")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--async-save", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    try:
        more = ["strategy.async_save=true"] if given.async_save else []
        result = rounds(given.rounds, given.steps, given.longest, given.seed, place, more)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    result |= {
        "date": str(date.today()),
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, torch {torch.__version__}",
        "command": "python benchmarks/kill_rounds.py " + " ".join(sys.argv[1:]),
    }
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    bad = ("wrong", "tensors_that_differ", "rows_twice")
    raise SystemExit(any(result[name] for name in bad) or not result["losses_equal"])


if __name__ == "__main__":
    main()
