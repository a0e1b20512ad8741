"""Losses of the default job on (simulated) cards against those of one CPU process, along all of its steps.

    python -m ascend_sim run -n 4 -- benchmarks/losses_on_npu.py --whole --json benchmarks/results/losses_on_npu.json

Two trainings in float32 part: what one rounding changes grows over the steps, between two CPU layouts as between a CPU
and a card. So the cards are compared in stretches: the CPU run saves every so many steps, and from each of its
checkpoints four cards train one stretch. Each stretch begins where the CPU was, which also shows that a checkpoint of
one process on the CPU goes on in four on cards. `--whole` adds the run that is never brought back, and as a measure of
what rounding does four processes on the CPU.

    python -m ascend_sim run -n 4 --float64 -- benchmarks/losses_on_npu.py --float64

takes rounding away: simulated cards that compute in float64 train the whole job in every layout of `LAYOUTS`, none of
them ever brought back. It begins with the validation of the untrained model, as the default job does; stretches do not.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BOUND = 1e-4
CARDS = ("trainer.accelerator=npu", "trainer.devices=4")
PLAIN = tuple(
    f"strategy.kernels.{name}=reference"
    for name in ("grouped_matmul", "permute", "swiglu", "rms_norm", "rotary", "attention")
)
# As `lightning-npu-tp prove`'s.
FLOAT64_BOUND = 1e-10
SEQUENCES = 8  # of a step, as in conf/data


def _layout(data: int, tensor: int, expert: int, *more: str) -> tuple[str, ...]:
    sizes = {"data": data, "tensor": tensor, "expert": expert}
    axes = (f"strategy.{axis}_parallel_size={size}" for axis, size in sizes.items())
    return (*axes, f"data.batch_size={SEQUENCES // data}", *more)


SLICES = "strategy.sequence_parallel=true"
LAYOUTS = {
    "tensor 4": _layout(1, 4, 4),
    "data 2, tensor 2, experts 4, slices, recomputed blocks": _layout(2, 2, 4, SLICES, "strategy.recompute=block"),
    "tensor 4, slices, reference kernels": _layout(1, 4, 4, SLICES, *PLAIN),
    "data 4, experts 2, recomputed experts, reference kernels": _layout(4, 1, 2, "strategy.recompute=moe", *PLAIN),
    "data 2, tensor 2, replicas, all to all": _layout(
        2, 2, 2, "strategy.data_parallel=replicate", "strategy.dispatch=all_to_all"
    ),
}


def losses(folder: Path, *overrides: str) -> dict[int, float]:
    """Training losses by step of a run of train.py."""
    train(folder, "validate_before=false", *overrides)
    return read(folder, "train/loss")


def train(folder: Path, *overrides: str) -> str:
    """Run train.py; what it said."""
    command = [sys.executable, "train.py", f"hydra.run.dir={folder}", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def read(folder: Path, column: str) -> dict[int, float]:
    """A column of a run's metrics, by step."""
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row[column]}


def apart(got: dict[int, float], wanted: dict[int, float]) -> dict[int, float]:
    """Relative difference of each step of `got`."""
    return {step: abs(loss - wanted[step]) / abs(wanted[step]) for step, loss in got.items()}


def whole(name: str, got: dict[int, float], wanted: dict[int, float]) -> dict[str, Any]:
    """A run that was never brought back: for how many steps it is within the bound, and the most at all."""
    differences = apart(got, wanted)
    within = next((step for step, value in differences.items() if value > BOUND), len(differences))
    return {"run": name, "steps_within": within, "most": max(differences.values())}


def in_float64(steps: int, names: list[str], json_file: Path | None) -> int:
    """Whole runs in float64 in each layout; writes the file after each."""
    whole_job = ("trainer.precision=64-true", f"trainer.max_steps={steps}")
    layouts: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(folder / "cpu", "trainer.accelerator=cpu", "trainer.devices=1", *whole_job)
        for number, title in enumerate(names):
            said = train(folder / str(number), *CARDS, *whole_job, *LAYOUTS[title])
            found: dict[str, Any] = {"layout": title, "reference_computes": said.count("the reference computes")}
            for column in ("train/loss", "train/grad_norm", "val/loss"):
                wanted, got = (read(folder / run, column) for run in ("cpu", str(number)))
                assert got.keys() == wanted.keys() and (column == "val/loss" or len(got) == steps), got.keys()
                found[column] = max(apart(got, wanted).values())
            layouts.append(found)
            numbers = ", ".join(f"{column} {found[column]:.1e}" for column in found if "/" in column)
            print(f"{title}, {steps} steps in float64: at most {numbers}", flush=True)
            write(json_file, {"steps": steps, "layouts": layouts})
    return int(max(layout[column] for layout in layouts for column in layout if "/" in column) > FLOAT64_BOUND)


def write(json_file: Path | None, result: dict[str, Any]) -> None:
    """Write a result with its date, command and machine."""
    if json_file is not None:
        head = {
            "date": date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "machine": f"{platform.machine()}, simulated cards",
        }
        json_file.write_text(json.dumps({**head, **result}, indent=2) + "\n")


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=20, help="optimizer steps of a stretch")
    parser.add_argument("--plain", action="store_true", help="without fused kernels")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--float64", action="store_true", help="whole runs in float64, in the layouts of LAYOUTS")
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="of --float64; all by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="of the runs on cards, as of train.py")
    arguments = parser.parse_args()
    if arguments.float64:
        return in_float64(arguments.steps, arguments.layout or list(LAYOUTS), arguments.json)
    # A stretch has the learning rates of the whole run, of which it is a piece.
    schedule = f"scheduler.total_steps={arguments.steps}"
    last, cards = f"trainer.max_steps={arguments.steps}", [*CARDS, schedule, *arguments.overrides]
    cards += PLAIN if arguments.plain else ()
    stretches: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saving = (f"callbacks.checkpoint.every_n_train_steps={arguments.every}", "callbacks.checkpoint.save_top_k=-1")
        wanted = losses(folder / "cpu", "trainer.accelerator=cpu", "trainer.devices=1", last, schedule, *saving)
        assert sorted(wanted) == list(range(arguments.steps)), sorted(wanted)
        for begin in range(0, arguments.steps, arguments.every):
            end = min(begin + arguments.every, arguments.steps)
            given = [*cards, f"trainer.max_steps={end}"]
            if begin:
                given.append(f"ckpt_path={folder / 'cpu/checkpoints' / f'step{begin}.ckpt'}")
            got = losses(folder / f"cards{begin}", *given)
            assert sorted(got) == list(range(begin, end)), sorted(got)
            differences = apart(got, wanted)
            most = max(differences.values())
            stretches.append({"first": begin, "last": end - 1, "first_differs": differences[begin], "most": most})
            print(
                f"steps {begin:4d} to {end - 1:4d}: {differences[begin]:.2e} in the first, {most:.2e} at most",
                flush=True,
            )
        if arguments.whole:
            four = ("trainer.accelerator=cpu", "trainer.devices=4", last, schedule)
            for title, given in (("4 cards", [*cards, last]), ("4 CPU processes", list(four))):
                runs.append(whole(title, losses(folder / title.replace(" ", "_"), *given), wanted))
                print(f"{title}: within {BOUND:g} for {runs[-1]['steps_within']} steps, at most {runs[-1]['most']:.2e}")
    most = max(stretch["most"] for stretch in stretches)
    print(f"{len(stretches)} stretches of {arguments.every} steps: at most {most:.2e}")
    write(arguments.json, {"stretches": stretches, "whole": runs})
    return int(most > BOUND)


if __name__ == "__main__":
    sys.exit(main())
