"""Real trainer calls on two processes: catches a launcher that starts ranks twice, hangs, exits 0, or leaks.

The strategy in these scripts is Lightning's data parallelism on our launcher.
"""

import json
import os
import signal
import socket
import time

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment
from scripts_launcher.runs import SCRIPTS, Run
from torch.distributed import TCPStore

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.launch.launcher import ProcessLauncher, _reserve_port, check_world

END_SECONDS = 15
TORCHRUN = ("-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")


@pytest.fixture
def start(tmp_path):
    runs = []

    def start(script, *arguments, interpreter=(), **variables):
        run = Run(*interpreter, SCRIPTS / script, *arguments, folder=tmp_path / f"run{len(runs)}", **variables)
        runs.append(run)
        return run

    yield start
    for run in runs:
        run.kill()


def last_line(run):
    return run.stderr.rstrip().splitlines()[-1].removeprefix("[rank0]: ")


def test_two_trainers_of_one_script_use_the_same_ranks_and_leave_nothing_behind(start):
    run = start("plain.py", OMP_NUM_THREADS="")
    assert run.end(240) == 0, run
    assert len(run.said("START")) == 2, run
    ends = sorted(run.said("END"))
    assert [end.split()[0] for end in ends] == ["0", "1"], run
    assert ends[0].split()[1] == ends[1].split()[1], run
    result = json.loads(run.said("RESULT")[0])
    assert result["restored"], run
    assert result["inside"] == ["0", "2", "127.0.0.1", ""], run
    refused = sorted(run.said("REFUSED"))
    assert refused[0].startswith("2 processes were started, but trainer.devices=3 and"), run
    assert refused[1].startswith("This Trainer asks for 3 processes, but the script has already started 2"), run


def test_a_rank_that_dies_before_the_process_group_exists_is_an_error_of_the_call(start):
    for run in [start("trouble.py", case) for case in ("raise-at-import", "raise-before-group")]:
        assert run.end(120) == 1, run
        assert last_line(run) == "ValueError: rank 1 came to grief", run


def test_the_rank_that_failed_in_a_step_is_named_last(start):
    raises, killed, first = (start("trouble.py", case) for case in ("raise-in-step", "killed", "rank-0-raises"))
    assert raises.until("READY 1").end(END_SECONDS) == 1, raises
    assert last_line(raises) == "ValueError: rank 1 came to grief", raises
    assert "RankFailure: Rank 1 (process" in raises.stderr, raises
    assert raises.stderr.count("rank 1 came to grief") == 1 and raises.stderr.count("Traceback") == 2, raises
    assert killed.until("READY 1").end(END_SECONDS) == 1, killed
    assert "RankFailure: Rank 1 (process" in last_line(killed) and "SIGKILL" in last_line(killed), killed
    assert first.until("READY 0").end(END_SECONDS) == 1, first
    assert last_line(first) == "ValueError: rank 0 came to grief", first
    assert "RankFailure" not in first.stderr, first


def test_a_signal_to_one_rank_ends_all_even_when_blocked_in_a_collective(start):
    cases = ("rank-1-blocked", "blocked", "blocked", "wait")
    to_rank_1, to_rank_0, interrupted, killed = runs = [start("trouble.py", case) for case in cases]
    for run in runs:
        run.until("READY 0").until("READY 1")
    os.kill(int(to_rank_1.said("READY 1")[0]), signal.SIGTERM)
    os.kill(to_rank_0.process.pid, signal.SIGTERM)
    interrupted.interrupt()
    os.kill(killed.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + END_SECONDS
    assert killed.end(2) == -signal.SIGKILL, killed
    # Rank 0 leaves its call by an exception at once and does not wait until rank 1 has been ended by force.
    assert to_rank_1.end(deadline - time.monotonic()) == 143, to_rank_1
    for run, who in ((to_rank_1, "Rank 1 (process"), (to_rank_0, "Rank 0")):
        assert who in run.stderr and run.stderr.count("was asked to end by SIGTERM; this ends the run.") == 1, run
    assert to_rank_1.said("LEFT") == ["0"] and to_rank_0.process.poll() is None, to_rank_1
    for run, code in ((to_rank_0, 143), (interrupted, 130)):
        assert run.end(deadline - time.monotonic()) == code, run
        assert "did not end by itself within 8 s of SIG" in run.stderr, run


def test_torchrun_with_another_number_of_processes_is_told_both_numbers(start):
    run = start("trouble.py", "wrong-count", interpreter=(*TORCHRUN, "--nproc-per-node=1"))
    assert run.end(120) == 1, run
    assert "1 processes were started, but trainer.devices=3 and trainer.num_nodes=1 ask for 3" in run.stderr, run


def test_torchrun_ends_with_the_error_of_the_rank_that_failed(start):
    run = start("trouble.py", "raise-in-step", interpreter=(*TORCHRUN, "--nproc-per-node=2"))
    assert run.until("READY 1").end(60) == 1, run
    # Whichever rank torchrun has seen end first.
    cause = run.stderr.partition("Root Cause (first observed failure)")[2]
    own, noted = "\n  ValueError: rank 1 came to grief\n", "failed first: ValueError: rank 1 came to grief\n"
    assert own in cause or noted in cause, run
    # Rank 0 may have been ended by torchrun before it could say anything.
    assert "Connection closed" not in run.stderr or noted in run.stderr, run


def test_a_local_rank_beyond_the_devices_is_told_the_numbers(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match=r"local rank 2, so there are at least 3, but trainer.devices=2"):
        check_world(LightningEnvironment(), 2, 1)
    check_world(LightningEnvironment(), 3, 1)


def test_without_processes_from_outside_any_number_is_fine(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "7")
    check_world(LightningEnvironment(), 2, 1)


def test_the_port_of_a_run_is_free_for_its_store_and_for_nobody_else():
    with _reserve_port() as held:
        port = held.getsockname()[1]
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        for _ in range(2):
            store = TCPStore("127.0.0.1", port, 1, True, wait_for_workers=False)
            store.set("key", "value")
            del store


def test_a_notebook_is_refused():
    assert not ProcessLauncher(LightningEnvironment(), 2, 1).is_interactive_compatible
