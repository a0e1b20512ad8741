"""How ranks meet. Catches keys of an earlier start, and a wait for ranks that nobody starts without a word."""

from __future__ import annotations

import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.launch import launcher, meeting
from lightning_npu_tp.launch.hydra_job import program
from lightning_npu_tp.launch.launcher import ProcessLauncher, check_world
from lightning_npu_tp.launch.meeting import keys_of_this_start, waiting_is_told

WORLD = 3


def start(store: dist.Store, late: int | None = None) -> list[dist.Store]:
    """All ranks' part of the store; one of them comes later than the others."""

    def meet(rank: int) -> dist.Store:
        time.sleep(0.2 if rank == late else 0)
        return keys_of_this_start(store, rank=rank, world=WORLD, timeout=timedelta(seconds=20))

    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(meet, range(WORLD)))


@pytest.mark.parametrize("late", [0, 2])
def test_ranks_that_are_started_again_meet_none_of_what_the_last_start_left(late: int) -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    first = start(store)
    first[1].set("address", "of the first start")
    assert all(part.get("address") == b"of the first start" for part in first)
    second = start(store, late)
    assert not any(part.check(["address"]) for part in second)
    second[2].set("address", "of the second")
    assert all(part.get("address") == b"of the second" for part in second)


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(TimeoutError, match=re.escape("Ranks [1, 2] of 3 did not come within 0:00:00.1")):
        keys_of_this_start(dist.HashStore(), rank=0, world=WORLD, timeout=timedelta(seconds=0.1))


def test_a_wait_for_other_ranks_is_told_with_what_to_look_at(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(meeting, "_FIRST_WORD_SECONDS", 0.05)
    hint = ProcessLauncher(LightningEnvironment(), 2, 1).hint
    for rank, whom in ((0, "the other ranks"), (1, "rank 0")):
        with waiting_is_told(rank, 2, "127.0.0.1:29500", hint):
            time.sleep(0.3)
        told = capfd.readouterr().err.strip()
        assert told.startswith(f"Rank {rank} of 2 has waited 0 s for {whom} at 127.0.0.1:29500. LOCAL_RANK=1 in its")
        assert "unset LOCAL_RANK, RANK, NODE_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT" in told
    with waiting_is_told(0, 2, "127.0.0.1:29500", hint):
        pass
    time.sleep(0.2)
    assert capfd.readouterr().err == ""


def test_ranks_that_nobody_starts_by_hand_are_not_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "LOCAL_RANK" not in ProcessLauncher(LightningEnvironment(), 2, 1).hint
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(launcher, "parent_channel", lambda: object())
    assert "LOCAL_RANK" not in ProcessLauncher(LightningEnvironment(), 2, 1).hint


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 is in the environment, as if somebody else started the 2 ranks"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 is in the environment, as if"),
        ({"RANK": "1"}, "RANK=1 is in the environment, but by LOCAL_RANK and NODE_RANK this process is rank 0"),
        ({"RANK": "0", "LOCAL_RANK": "1", "MASTER_PORT": "1"}, "RANK=0 is in the environment, but by LOCAL_RANK"),
        ({"NODE_RANK": "1"}, r"NODE_RANK=1 \(or GROUP_RANK\) is in the environment, but trainer.num_nodes is 1"),
        ({"GROUP_RANK": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}, r"NODE_RANK=2 \(or GROUP_RANK\)"),
    ],
)
def test_variables_that_another_run_has_left_are_told_at_once(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], told: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{told}.*unset LOCAL_RANK, RANK, NODE_RANK, WORLD_SIZE, MASTER_ADDR and"):
        check_world(LightningEnvironment(), 2, 1)


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "WORLD_SIZE": "7", "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "1"},
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"},
        {"NODE_RANK": "0", "LOCAL_RANK": "1", "MASTER_PORT": "1"},
    ],
)
def test_variables_that_describe_a_rank_of_the_run_are_fine(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_world(LightningEnvironment(), 2, 1)


def test_one_process_needs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_world(LightningEnvironment(), 1, 1)


def test_ranks_of_one_machine_meet_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    for num_nodes, address in ((1, "127.0.0.1"), (2, "10.255.255.1")):
        monkeypatch.setenv("MASTER_ADDR", "10.255.255.1")
        with launcher._restored_environment():
            ProcessLauncher(LightningEnvironment(), 2, num_nodes)._set_environment()
            assert launcher.os.environ["MASTER_ADDR"] == address


@pytest.mark.parametrize(
    ("spec", "argument", "command"),
    [
        (None, "train.py", ["{folder}/train.py"]),
        ("package.train", "train.py", ["-m", "package.train"]),
        # A worker of a pool of processes: its main module is the pool's, its arguments the script's that made the pool.
        ("pool.worker", "train.py", ["{folder}/train.py"]),
        # Arguments that a program has made up for itself say nothing.
        ("package.train", "a program", ["-m", "package.train"]),
    ],
)
def test_the_program_is_the_one_that_the_user_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, spec: str | None, argument: str, command: list[str]
) -> None:
    for name in ("train.py", "worker.py"):
        (tmp_path / name).touch()
    origin = tmp_path / f"{(spec or '').partition('.')[2]}.py"
    found = None if spec is None else SimpleNamespace(name=spec, origin=str(origin))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", found)
    monkeypatch.setattr(sys, "argv", [argument, "-m", "lr=1,2"])
    assert program(str(tmp_path)) == [sys.executable, *(part.format(folder=tmp_path) for part in command)]
