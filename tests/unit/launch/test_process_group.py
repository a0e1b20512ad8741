"""The store behind the process group. Catches keys of one group, or of an earlier job, that the next group meets."""

from __future__ import annotations

import itertools
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_npu_tp.launch import process_group
from lightning_npu_tp.launch.process_group import close_process_group, open_process_group


@pytest.fixture
def prefixes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, str]]:
    """(store, prefix) of each group that is opened; nothing is connected."""
    opened: list[tuple[Any, str]] = []
    numbers = itertools.count()
    monkeypatch.setattr(process_group, "_stores", {})
    monkeypatch.setattr(process_group, "_generations", process_group.Counter())
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(next(numbers), 0, 2)]))
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: opened.append((store, prefix)))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(process_group, "meet_hosts", lambda *_: None)
    return opened


def open_at(port: int) -> None:
    environment = SimpleNamespace(global_rank=lambda: 0, world_size=lambda: 2, main_address="127.0.0.1", main_port=port)
    open_process_group(
        environment,  # type: ignore[arg-type]
        backend="gloo",
        timeout=timedelta(seconds=1),
        device=torch.device("cpu"),
    )


def test_each_group_has_keys_of_its_own_in_one_store_and_a_new_job_starts_anew(prefixes) -> None:
    for port in (1000, 1000, 2000, 1000):
        open_at(port)
    assert prefixes == [
        (0, "lightning_npu_tp/1"),
        (0, "lightning_npu_tp/2"),
        (1, "lightning_npu_tp/1"),
        (0, "lightning_npu_tp/3"),
    ]


def test_closing_what_is_not_open_is_no_error() -> None:
    assert not dist.is_initialized()
    close_process_group()


def test_what_cannot_be_closed_is_not_tried_again_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch_npu closes what is named there when the interpreter ends.
    names = {"a group": "its name"}

    def destroy() -> None:
        raise RuntimeError("the card is gone")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", destroy)
    monkeypatch.setattr(dist.distributed_c10d, "_world", SimpleNamespace(pg_names=names))
    with pytest.raises(RuntimeError, match="the card is gone"):
        close_process_group()
    assert not names
