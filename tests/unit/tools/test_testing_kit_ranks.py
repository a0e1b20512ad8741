"""The part of the testing kit that runs ranks; every distributed test stands on it.

Catches: a failing or hanging rank that passes unseen or without its own traceback, state that one
call leaves to the next, and processes or files left behind. Imports little, since each rank does too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lightning_npu_tp.errors import ConfigError, RankFailure
from lightning_npu_tp.tools.testing import ranks
from lightning_npu_tp.tools.testing.ranks import RankPool, RankTimeout, free_port, run_ranks


def sum_of_ranks(rank, world_size, tensor):
    total = torch.full((3,), float(rank), dtype=torch.bfloat16)
    if world_size > 1:
        dist.all_reduce(total)
    return rank, total + tensor, os.getpid(), torch.get_num_threads(), torch.rand(()).item()


def raise_on_rank_one(rank, world_size):
    if rank == 1:
        raise ValueError("the mistake of rank one")
    dist.barrier()


def die_on_rank_one(rank, world_size):
    # On a busy machine one begins long after the other.
    dist.barrier()
    if rank == 1:
        # Rank 0 reports first, as a rank often does whose peer's connection broke.
        time.sleep(0.2)
        os._exit(3)
    raise ConnectionError("lost rank one")


def hang_on_rank_one(rank, world_size):
    if rank == 1:
        time.sleep(600)


def unpicklable(rank, world_size):
    return (x for x in ())


def environment(rank, world_size):
    os.environ["LEFT_BY_A_TEST"] = "1"
    return dist.is_initialized(), {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


def keep_a_mesh(rank, world_size):
    # As DTensor's caches do.
    sys.kept = init_device_mesh("cpu", (world_size,))


def connections(rank, world_size):
    names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


def left_by_a_test(rank, world_size):
    return os.environ.get("LEFT_BY_A_TEST")


def destroys_its_group(rank, world_size):
    dist.destroy_process_group()
    return rank


def connects_late(rank, world_size):
    real = dist.init_process_group

    def init(*arguments, **options):
        dist.init_process_group = real
        real(*arguments, **options)
        time.sleep(0.3)
        sys.connected_at = time.monotonic()

    if rank == 1:
        dist.init_process_group = init


def begin_and_connection(rank, world_size):
    return time.monotonic(), getattr(sys, "connected_at", None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the kit keeps its temporary files; must be empty in the end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


def test_results_come_back_in_rank_order_from_seeded_single_threaded_processes(folder, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    results = run_ranks(sum_of_ranks, 2, torch.ones(3, dtype=torch.bfloat16))
    assert [result[0] for result in results] == [0, 1]
    for _, total, pid, threads, random in results:
        assert total.dtype == torch.bfloat16 and total.tolist() == [2.0] * 3
        assert not psutil.pid_exists(pid)
        assert threads == 1
        assert random == results[0][4]


def test_a_world_of_one_works_and_a_result_that_cannot_travel_is_the_ranks_failure(folder):
    with RankPool(1) as pool:
        assert pool.run(sum_of_ranks, 1)[0][1].tolist() == [1.0] * 3
        with pytest.raises(RankFailure, match="cannot pickle 'generator' object"):
            pool.run(unpicklable)


def test_a_pool_keeps_its_processes_and_gives_each_call_a_new_process_group(pool):
    first, second = (pool.run(sum_of_ranks, torch.zeros(3, dtype=torch.bfloat16)) for _ in range(2))
    assert [result[2] for result in first] == [result[2] for result in second]
    assert [result[4] for result in first] == [result[4] for result in second]
    assert pool.run(destroys_its_group) == [0, 1]
    initialised, variables = pool.run(environment, backend=None)[1]
    assert not initialised
    assert variables == {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    assert pool.run(left_by_a_test) == [None, None]


def test_no_rank_begins_before_the_last_has_connected(pool):
    pool.run(connects_late, backend=None)
    (begin, _), (_, connected) = pool.run(begin_and_connection)
    assert begin >= connected


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux names the threads of a process")
def test_connections_of_a_call_end_with_it(pool):
    assert pool.run(connections)[0]
    pool.run(keep_a_mesh)
    assert pool.run(connections, backend=None) == [[], []]


def test_ranks_rest_between_calls_and_ports_lie_below_those_of_connections(pool):
    for _ in range(2):
        for process in [psutil.Process(result[2]) for result in pool.run(sum_of_ranks, 0)]:
            deadline = time.monotonic() + 5
            while process.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
                time.sleep(0.01)
            assert process.status() == psutil.STATUS_STOPPED
    assert all(15_000 <= free_port() < 32_000 for _ in range(20))


def test_the_failing_ranks_own_traceback_is_raised_and_the_next_call_works(pool):
    before = [result[2] for result in pool.run(sum_of_ranks, 0)]
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"rank 1 of 2 failed(.|\n)*raise_on_rank_one(.|\n)*the mistake of rank one"):
        pool.run(raise_on_rank_one, timeout=100)
    assert time.monotonic() - start < 20
    assert not any(psutil.pid_exists(pid) for pid in before)
    assert len(pool.run(sum_of_ranks, 0)) == 2


def test_a_rank_that_dies_is_named_before_the_peers_that_lost_it(pool):
    with pytest.raises(
        RankFailure, match=r"rank 1 of 2 failed:\s+rank 1 died without a word; exit code 3(.|\n)*lost rank one"
    ):
        pool.run(die_on_rank_one)


def test_a_hang_ends_with_the_stacks_of_the_ranks_that_hang(folder):
    with pytest.raises(RankTimeout, match=r"ranks \[0, 1\] of 2 were still running after 3 s") as caught:
        run_ranks(hang_on_rank_one, 2, timeout=3)
    rank_0, rank_1 = str(caught.value).split("--- rank 1 ---")
    assert "in hang_on_rank_one" in rank_1
    # Rank 0 waits in the kit's own barrier.
    assert "in barrier" in rank_0


def test_ranks_that_start_too_slowly_end_in_a_time_out_that_says_so(folder, monkeypatch):
    monkeypatch.setattr(ranks, "START_TIMEOUT", 0.01)
    with pytest.raises(RankTimeout, match=r"starting the ranks: ranks \[0, 1\] of 2 were still running") as caught:
        run_ranks(sum_of_ranks, 2, 0)
    assert str(caught.value).count("no stack: it is still starting") == 2


def test_a_function_inside_a_function_is_refused_before_anything_starts():
    def inner(rank, world_size):
        return rank

    with pytest.raises(ConfigError, match="inner cannot be sent to another process"):
        run_ranks(inner, 1)
    with pytest.raises(ConfigError, match="world_size=0"):
        run_ranks(sum_of_ranks, 0)


def test_a_killed_parent_takes_its_ranks_along(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\n"
        "from lightning_npu_tp.tools.testing.ranks import run_ranks\n"
        "def sleep(rank, world_size, folder):\n"
        "    open(f'{folder}/{rank}.part', 'w').write(str(os.getpid()))\n"
        "    os.rename(f'{folder}/{rank}.part', f'{folder}/{rank}.pid')\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        f"    run_ranks(sleep, 2, {str(tmp_path)!r}, timeout=600)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        deadline = time.monotonic() + 120
        while len(files := list(tmp_path.glob("*.pid"))) < 2:
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        parent.kill()
        parent.wait()
    pids = [int(file.read_text()) for file in files]
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline, "ranks outlived their parent"
        time.sleep(0.1)
