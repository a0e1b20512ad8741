"""Losses of the default job on (simulated) cards against those of one CPU process, along all of its steps.

    python -m ascend_sim run -n 4 -- benchmarks/losses_on_npu.py --whole --json benchmarks/results/losses_on_npu.json

Two trainings in float32 part: what one rounding changes grows over the steps, between two CPU layouts as between a CPU
and a card. So the cards are compared in stretches: the CPU run saves every so many steps, and from each of its
checkpoints four cards train one stretch. Each stretch begins where the CPU was, which also shows that a checkpoint of
one process on the CPU goes on in four on cards. `--whole` adds the run that is never brought back, and as a measure of
what rounding does four processes on the CPU.
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


def losses(folder: Path, *overrides: str) -> dict[int, float]:
    """Training losses by step of a run of train.py."""
    command = [sys.executable, "train.py", f"hydra.run.dir={folder}", "validate_before=false", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


def apart(got: dict[int, float], wanted: dict[int, float]) -> dict[int, float]:
    """Relative difference of each step of `got`."""
    return {step: abs(loss - wanted[step]) / abs(wanted[step]) for step, loss in got.items()}


def whole(name: str, got: dict[int, float], wanted: dict[int, float]) -> dict[str, Any]:
    """A run that was never brought back: for how many steps it is within the bound, and the most at all."""
    differences = apart(got, wanted)
    within = next((step for step, value in differences.items() if value > BOUND), len(differences))
    return {"run": name, "steps_within": within, "most": max(differences.values())}


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=20, help="optimizer steps of a stretch")
    parser.add_argument("--plain", action="store_true", help="without fused kernels")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="of the runs on cards, as of train.py")
    arguments = parser.parse_args()
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
    if arguments.json:
        result = {
            "date": date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "machine": f"{platform.machine()}, simulated cards",
            "stretches": stretches,
            "whole": runs,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(most > BOUND)


if __name__ == "__main__":
    sys.exit(main())
