"""torch_npu's launch queue fails on the real torch_npu: whoever loses its error, the run is told and ends.

Catches a queue that is dead and unnoticed: numbers that no card computed, a checkpoint of them, a process that hangs;
and a watch that takes a queue that is only busy for a dead one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

START = """
import ctypes, os, sys, time
import torch, torch_npu
import ascend_sim
from lightning_npu_tp.devices import launch_queue

device = torch.device("npu", 0)
older, failing = torch.npu.Event(), torch.npu.Event()
older.record()
failing.record()
torch.npu.synchronize()

def end(error):
    print("ended:", error, flush=True)
    os._exit(7)

def fail(swallowed):
    global older
    # The watch must not come between the failure and the one who swallows it.
    sys.setswitchinterval(1000)
    with ascend_sim.inject("aclrtRecordEvent", code=507015, text="EI0004: the rank table is torn"):
        failing.record()
        ctypes.PyDLL(None).usleep(20_000)
        if swallowed:
            # Its destructor goes through the queue and keeps quiet about what it gets there.
            older = None
    sys.setswitchinterval(0.005)

def work():
    while True:
        time.sleep(0.01)
"""
CAUSE = "EI0004: the rank table is torn"


def child(program: str, log: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    extra = {} if log is None else {"ASCEND_PROCESS_LOG_PATH": str(log)}
    return subprocess.run(
        [sys.executable, "-c", START + program],
        env={**os.environ, **extra},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def raised_while_working(swallowed: bool, log: Path, before: str = "") -> str:
    program = f"""
{before}
launch_queue._UNWIND_SECONDS = launch_queue._SPEECHLESS_SECONDS = 0.5
launch_queue.watch_launch_queue(device, end)
time.sleep(0.5)
try:
    fail({swallowed})
    # What the queue says of each thing that it drops must not hide the cause.
    for _ in range(10 * {swallowed}):
        failing.record()
    work()
except launch_queue.LaunchQueueEnded as error:
    launch_queue.expect_unwinding(error)
    launch_queue.unwatch_launch_queue()
    # A program that goes on without the card may.
    time.sleep(2)
    print("raised:", error, flush=True)
    os._exit(0)
"""
    done = child(program, log)
    assert done.returncode == 0 and "raised:" in done.stdout, done.stdout + done.stderr
    return done.stdout.split("raised:")[1]


def test_an_error_that_nobody_has_fetched_is_raised_where_the_trainer_runs(tmp_path: Path) -> None:
    told = raised_while_working(swallowed=False, log=tmp_path)
    # In torch_npu's own words.
    assert CAUSE in told and "The Inner error is reported as above" in told


@pytest.mark.parametrize("name", ["acl_thread", "not shown here"])
def test_a_swallowed_error_is_read_in_the_log(tmp_path: Path, name: str) -> None:
    # Where the thread is seen to have ended, nothing may wait for what it leaves behind.
    for_ever = "launch_queue._is_recorded = lambda event, stream: time.sleep(1000)" if name == "acl_thread" else ""
    told = raised_while_working(swallowed=True, log=tmp_path, before=f"launch_queue._NAME = {name!r}\n{for_ever}")
    assert "swallowed its error" in told and CAUSE in told
    assert str(next(tmp_path.glob("debug/plog/plog-*.log"))) in told


def test_a_trainer_that_hangs_is_ended_with_the_error(tmp_path: Path) -> None:
    # A record that was dropped is waited for without an end.
    program = """
launch_queue._NOTICE_SECONDS = 1.0
launch_queue.watch_launch_queue(device, end)
time.sleep(0.5)
fail(True)
failing.record()
failing.synchronize()
"""
    done = child(program, tmp_path)
    assert done.returncode == 7 and "ended:" in done.stdout and CAUSE in done.stdout, done.stdout + done.stderr


def test_one_that_hangs_on_its_way_out_is_ended_even_if_it_holds_the_interpreters_lock(tmp_path: Path) -> None:
    program = """
launch_queue._UNWIND_SECONDS = launch_queue._SPEECHLESS_SECONDS = 1.0
launch_queue.watch_launch_queue(device, end)
time.sleep(0.5)
fail(True)
launch_queue.expect_unwinding(RuntimeError("told"))
ctypes.PyDLL(None).sleep(100)
"""
    begin = time.monotonic()
    done = child(program, tmp_path)
    assert done.returncode == 1 and "Timeout" in done.stderr, done.stdout + done.stderr
    assert time.monotonic() - begin < 60


def test_one_that_hangs_on_its_way_out_is_not_interrupted_again_but_ended(tmp_path: Path) -> None:
    program = """
launch_queue._UNWIND_SECONDS = 1.0
launch_queue.watch_launch_queue(device, end)
time.sleep(0.5)
fail(True)
launch_queue.expect_unwinding(RuntimeError("told before"))
work()
"""
    done = child(program, tmp_path)
    assert done.returncode == 7 and "ended: told before" in done.stdout, done.stdout + done.stderr


def test_a_queue_that_is_busy_is_not_taken_for_a_dead_one() -> None:
    # Nor is a thread that has inherited its name.
    program = """
import threading
heir = threading.Thread(target=lambda: (ctypes.CDLL(None).prctl(15, b"acl_thread"), time.sleep(0.5)))
heir.start()
launch_queue.watch_launch_queue(device, end)
heir.join()
time.sleep(0.2)
with ascend_sim.inject("aclrtRecordEvent", sleep=4.0):
    failing.record()
    until = time.monotonic() + 6
    while time.monotonic() < until:
        time.sleep(0.01)
launch_queue.require_launch_queue(device)
launch_queue.unwatch_launch_queue()
print("fine")
"""
    done = child(program)
    assert done.returncode == 0 and done.stdout.endswith("fine\n"), done.stdout + done.stderr


TRAIN = """
import atexit, threading
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from lightning_npu_tp import NPUTensorParallelStrategy

class Job(LightningModule):
    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.network = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))

    def training_step(self, batch, batch_idx):
        return self.network(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Fail(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1:
            then(trainer)

    def on_exception(self, trainer, module, exception):
        # Longer than a thread has to notice, and less than it has to clean up.
        time.sleep(2)

launch_queue._NOTICE_SECONDS, launch_queue._UNWIND_SECONDS, launch_queue._SPEECHLESS_SECONDS = 1.0, 8.0, 0.0
torch.npu.empty_cache = lambda: print("emptied")
# When the interpreter ends torch_npu waits for the card.
atexit.register(ctypes.PyDLL(None).sleep, 100)
job = Job()
trainer = Trainer(
    accelerator="npu", devices=1, max_steps=4, callbacks=[Fail()], logger=False,
    strategy=NPUTensorParallelStrategy(),
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
try:
    trainer.fit(job, DataLoader(torch.arange(32).view(8, 4) % 16, batch_size=2))
finally:
    print("weights on", next(job.parameters()).device)
    print("threads:", [thread.name for thread in threading.enumerate()])
"""


@pytest.mark.parametrize(
    ("then", "told"),
    [
        ("work()", "work (<string>"),
        ("failing.record(), failing.synchronize()", "A call of the device failed on rank 0"),
        ("trainer.save_checkpoint(sys.argv[1])", "is not saved, because it would not hold what was trained"),
    ],
    ids=["going on", "hanging", "saving"],
)
def test_a_run_whose_queue_is_dead_ends_with_the_cause_and_without_a_checkpoint(
    tmp_path: Path, then: str, told: str, request: pytest.FixtureRequest
) -> None:
    target = tmp_path / "end.ckpt"
    then = then.replace("sys.argv[1]", repr(str(target)))
    program = f"\ndef then(trainer):\n    fail(True)\n    {then}\n{TRAIN}"
    done = child(program, tmp_path / "log")
    assert done.returncode == 1, done.stdout + done.stderr
    assert told in done.stderr and "EI0004: the rank table does not hold." in done.stderr, done.stderr[-3000:]
    # Nothing was fetched from the card that does not come from there.
    assert "emptied" not in done.stdout
    if "hanging" not in request.node.name:
        assert "weights on npu:0" in done.stdout and "launch queue watch" not in done.stdout, done.stdout
        # What waits for the card when the interpreter ends did not end by itself.
        assert "Timeout" in done.stderr
    assert not target.exists()


def test_a_run_that_is_well_leaves_no_watch() -> None:
    program = "\ndef then(trainer):\n    print([thread.name for thread in threading.enumerate()])\n"
    done = child(program + TRAIN.replace("atexit.register", "#"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("launch queue watch") == 1 and "weights on cpu" in done.stdout, done.stdout


def test_a_rank_that_hangs_over_its_dead_queue_is_reported_with_the_cause(tmp_path: Path) -> None:
    hang = "failing.record(), failing.synchronize()"
    program = START + f"\ndef then(trainer):\n    fail(True)\n    {hang}\n" + TRAIN.replace("devices=1", "devices=2")
    program = program.replace('"npu", 0)', '"npu", int(os.environ.get("LOCAL_RANK", 0)))')
    program = program.replace("if batch_idx == 1:", "if batch_idx == 1 and trainer.global_rank == 1:")
    script = tmp_path / "train.py"
    script.write_text(program.replace("older, failing", "torch.npu.set_device(device)\nolder, failing"))
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "ASCEND_PROCESS_LOG_PATH": str(tmp_path / "log")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0, done.stdout + done.stderr
    told = done.stderr.partition("A call of the device failed on rank 1")[2]
    assert told.split(". ")[1].startswith("EI0004: the rank table does not hold"), done.stderr[-3000:]
