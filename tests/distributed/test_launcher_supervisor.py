"""The life and death of ranks, without Torch: catches a run that hangs, exits 0 or outlives its ranks.

All runs are started at once, because they mostly wait.
"""

import os
import signal
import time

import pytest
from scripts_launcher.runs import SCRIPTS, Run

CASES = [
    "killed",
    "exit-0-in-call",
    "exit-3-in-call",
    "exit-before-call",
    "raise-and-hang",
    "raise-after-call",
    "raise-at-the-end",
    "rank-0-raises",
    "rank-0-raises-after-call",
    "rank-0-hangs-unwinding",
    "one-call-more",
    "all-raise-and-save",
    "all-raise-and-catch",
    "caught-then-another",
    "caught-then-done",
    "three-ranks",
    "parent-killed-during-import",
    "parent-killed-without-death-signal",
    "worker-terminated",
    "output",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    started = time.monotonic()
    all_runs = {case: Run(SCRIPTS / "light.py", case, folder=tmp_path_factory.mktemp(case)) for case in CASES}
    for run in all_runs.values():
        run.started = started
    yield all_runs
    for run in all_runs.values():
        run.kill()


def end(run):
    """The exit code; 15 s after its trouble, which comes within the first seconds."""
    return run.end(max(1.0, run.started + 20 - time.monotonic()))


def last_line(run):
    return run.stderr.rstrip().splitlines()[-1]


def test_a_killed_rank_ends_a_rank_0_that_is_blocked_in_a_collective(runs):
    run = runs["killed"]
    assert end(run) == 128 + signal.SIGKILL, run
    assert "was killed by signal 9 (SIGKILL)" in last_line(run), run
    assert "Rank 0 is ended; it was at" in run.stderr and "in block" in run.stderr, run


@pytest.mark.parametrize("case", ["exit-0-in-call", "exit-before-call"])
def test_a_rank_that_leaves_quietly_with_exit_code_0_is_a_failure(runs, case):
    run = runs[case]
    assert end(run) == 1, run
    assert "ended with exit code 0 during or before call 1 of a Trainer" in last_line(run), run


def test_a_rank_that_ends_by_an_exit_code_is_not_said_to_have_a_traceback(runs):
    run = runs["exit-3-in-call"]
    assert end(run) == 3, run
    told = run.stderr.partition("Rank 1 (process")[2]
    assert "ended with exit code 3. It left no traceback. The end of its stderr:\n\n" in told, run
    assert "Its own traceback" not in told and last_line(run) == "UserWarning: something else", run


def test_a_rank_that_raises_and_hangs_unwinding_ends_the_run_with_its_traceback(runs):
    run = runs["raise-and-hang"]
    assert end(run) == 1, run
    assert last_line(run) == "ValueError: rank 1 came to grief", run
    assert "Rank 1 (process" in run.stderr, run


def test_a_rank_that_raises_after_the_call_ends_a_rank_0_that_does_something_else(runs):
    run = runs["raise-after-call"]
    assert end(run) == 1, run
    assert last_line(run) == "ValueError: rank 1 came to grief", run


def test_a_rank_that_raises_when_rank_0_has_already_finished_fails_the_run(runs):
    run = runs["raise-at-the-end"]
    assert end(run) == 1, run
    assert run.said("END") == ["0"], run
    assert last_line(run) == "ValueError: rank 1 came to grief", run


@pytest.mark.parametrize("case", ["rank-0-raises", "rank-0-raises-after-call"])
def test_an_error_of_rank_0_ends_the_others_and_is_printed_last(runs, case):
    run = runs[case]
    assert end(run) == 1, run
    assert last_line(run) == "ValueError: rank 0 came to grief", run


def test_a_rank_0_that_hangs_unwinding_is_ended_with_its_own_traceback(runs):
    run = runs["rank-0-hangs-unwinding"]
    assert end(run) == 1, run
    assert last_line(run) == "ValueError: rank 0 came to grief", run


def test_a_rank_that_makes_one_call_more_than_rank_0_is_ended_and_is_a_failure(runs):
    run = runs["one-call-more"]
    assert end(run) == 1, run
    assert "was still in a trainer call when rank 0 had finished its script" in last_line(run), run


def test_ranks_that_all_raise_may_finish_saving_together(runs):
    run = runs["all-raise-and-save"]
    assert end(run) == 1, run
    assert sorted(run.said("SAVED")) == ["0", "1"], run
    assert last_line(run) == "ValueError: rank 0 came to grief", run


def test_an_error_that_every_rank_catches_does_not_end_the_run(runs):
    run = runs["all-raise-and-catch"]
    assert end(run) == 0, run
    assert sorted(run.said("END")) == ["0", "1"], run


def test_after_an_error_that_was_caught_the_one_that_ended_the_rank_is_told(runs):
    run = runs["caught-then-another"]
    assert end(run) == 1, run
    assert "FileNotFoundError: [Errno 2] No such file or directory: '/nonexistent/batch.json'" in last_line(run), run


def test_what_a_rank_writes_after_an_error_that_was_caught_is_not_lost(runs):
    run = runs["caught-then-done"]
    assert end(run) == 0 and "UserWarning: the batch is halved" in run.stderr, run


def test_the_rank_with_an_error_of_its_own_is_blamed_before_one_that_lost_its_peer(runs):
    run = runs["three-ranks"]
    assert end(run) == 1, run
    assert last_line(run) == "ValueError: rank 1 came to grief", run
    assert "RankFailure: Rank 1 (process" in run.stderr, run
    # Its own traceback once, and where rank 0 was; nothing of the connections that were lost.
    assert run.stderr.count("Traceback") == 2 and "Connection closed" not in run.stderr, run


@pytest.mark.parametrize("case", ["parent-killed-during-import", "parent-killed-without-death-signal"])
def test_a_killed_parent_takes_its_ranks_along(runs, case):
    run = runs[case].until("READY")
    os.kill(run.process.pid, signal.SIGKILL)
    assert run.end(2) == -signal.SIGKILL, run


def test_ending_a_forked_worker_is_not_taken_for_a_sigterm_to_the_rank(runs):
    run = runs["worker-terminated"]
    assert end(run) == 0, run
    assert run.said("HANDLER") == [f"{signal.SIG_DFL!s} -1 {-signal.SIGTERM}"] * 2, run


def test_what_a_rank_writes_to_stderr_passes_through_unchanged(runs):
    run = runs["output"]
    assert end(run) == 0, run
    assert (run.folder / "stderr").read_bytes() == b"10%\r20%\r\xff\n  plain\n"
