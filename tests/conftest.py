"""What every test starts from: no network, one thread, ranks that are kept between tests, nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from cross_products import mark

from lightning_npu_tp.tools.testing.ranks import RankPool, run_ranks

# Before any test module imports transformers; every process that a test starts inherits them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

# What a launcher or a distributed run leaves in the environment and the next run would believe.
RUN_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what waits for `make test-all`."""
    by_name = any("::" in argument for argument in config.args)
    mark(items, are_all=not by_name and not config.getoption("last_failed", default=False))


def child_processes() -> list[str]:
    """Living children of this process, grandchildren included, without multiprocessing's own resource tracker."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
            if process.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in command:
                found.append(f"{process.pid}: {command}")
        except psutil.NoSuchProcess:
            continue
    return found


def orphaned_shared_memory() -> set[str]:
    """Shared-memory files of torch (`torch_<pid>_…`) whose process is gone."""
    files = Path("/dev/shm").glob("torch_*_*")
    return {file.name for file in files if not psutil.pid_exists(int(file.name.split("_")[1]))}


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail the session when a test leaves a process or a shared-memory file."""
    before = orphaned_shared_memory()
    yield
    left = child_processes()
    assert not left, f"tests left processes behind: {left}"
    files = orphaned_shared_memory() - before
    assert not files, f"tests left shared-memory files behind: {sorted(files)}"


@pytest.fixture(autouse=True)
def clean_run_state() -> Iterator[None]:
    """One thread, a fixed seed; the run's variables and the default dtype restored, no process group kept."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = {name: os.environ.pop(name, None) for name in RUN_VARIABLES}
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def on_ranks(nothing_left_behind: None) -> Iterator[Callable[..., list[Any]]]:
    """`run_ranks` with processes that live through the session: `on_ranks(fn, world_size, *args, timeout=60)`.

    One pool per world size up to 4, so that importing torch and Lightning is paid once; larger ones are few, and
    would hold gigabytes. Depends on the check above so that the pools are closed before it looks.
    """
    pools: dict[int, RankPool] = {}

    def run(
        fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, backend: str | None = "gloo"
    ) -> list[Any]:
        if world_size > 4:
            return run_ranks(fn, world_size, *args, timeout=timeout, backend=backend)
        pool = pools.setdefault(world_size, RankPool(world_size))
        return pool.run(fn, *args, timeout=timeout, backend=backend)

    yield run
    for pool in pools.values():
        pool.close()
