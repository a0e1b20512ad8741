"""Whole runs on simulated cards: faults at places of a run, and a rehearsal summed up.

Catches a default that does not work on cards or speaks of what no user can mend, a fault that is not explained, a run
that hangs or leaves something behind, a checkpoint that a fault damages, and a rehearsal that misses what its processes
did. `benchmarks/fault_matrix.py` runs every code; here are two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command: str, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=dict(os.environ)
    )


def test_the_default_job_on_two_data_ranks_writes_its_files_and_says_no_more_than_it_should(tmp_path: Path) -> None:
    """As a user gives it: all callbacks and loggers, validations before and after."""
    folder = tmp_path / "run"
    cards = ("trainer.accelerator=npu", "trainer.devices=2", "strategy.data_parallel_size=2")
    told = "strategy.hccl.connect_timeout_s=300"
    short = ("trainer.max_steps=3", "trainer.limit_val_batches=1", "data.batch_size=2", "data.max_tokens=50000")
    given = ("run", "-n", "4", "train.py", *cards, told, *short, f"hydra.run.dir={folder}")
    done = run("-m", "ascend_sim", *given, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (line.split() for line in done.stdout.splitlines() if line.startswith("validation "))
    assert float(after[after.index("loss") + 1]) < float(before[before.index("loss") + 1])
    assert (folder / "loss.png").stat().st_size and (folder / "checkpoints" / "last.ckpt").is_dir()
    assert list((folder / "tensorboard").rglob("events*"))
    assert done.stderr.count("HCCL_CONNECT_TIMEOUT=300") == 1, done.stderr
    python = [line for line in done.stderr.splitlines() if ".py:" in line]
    assert not python, python


def test_a_fault_ends_all_ranks_with_cause_and_remedy_and_a_whole_checkpoint(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    asked = ("--codes", "507015", "EI0012", "--places", "forward", "save", "--json", str(table))
    done = run("benchmarks/fault_matrix.py", *asked, timeout=250)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    cases = json.loads(table.read_text())["table"]
    assert [(case["code"], case["place"]) for case in cases] == [
        (code, place) for code in ("507015", "EI0012") for place in ("forward", "save")
    ]
    assert all(case["struck"] and 0 not in case["exit_codes"] and not case["wrong"] for case in cases)


CHILD = """
import sys, torch, torch_npu
x = torch.ones(4 << 20, device="npu:1")
print("child", (x + 1).sum().item())
"""
PARENT = f"""
import subprocess, sys, torch, torch_npu
subprocess.run([sys.executable, "-c", {CHILD!r}], check=True)
x = torch.ones(8 << 20, device="npu:0")
x[:9].mode()
sys.exit(3)
"""


def test_a_rehearsal_sums_up_what_its_processes_did(tmp_path: Path) -> None:
    sums = tmp_path / "sums.json"
    # As `make install-npu` and pip leave it, in an environment that is not activated.
    command = [Path(sys.executable).parent / "lightning-npu-tp", "rehearse", "-n", "4", "--json", sums]
    done = subprocess.run(
        [*command, "--", "python", "-c", PARENT], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 3, done.stdout + done.stderr
    told = json.loads(sums.read_text())
    assert told["exit_code"] == 3 and len(told["processes"]) == 2
    first, second = told["processes"]
    assert first["peak_bytes"]["0"] >= 32 << 20 and second["peak_bytes"]["1"] >= 16 << 20
    assert any("mode" in name for name in told["fallbacks"]) and told["unordered_accesses"] == 0
    assert any(place.startswith("aten::_local_scalar_dense") for place in told["host_waits"])
    assert "exit code 3; 2 processes on simulated cards" in done.stdout
