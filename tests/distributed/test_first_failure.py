"""Which rank failed first, told by the ranks to each other where nobody supervises them.

Catches: ranks that blame each other, a rank that is noted to have failed because of itself or of what all ranks refuse,
and an error that waits for a store that is gone.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_npu_tp.launch.first_failure import first_failure_named


def notes_of(error: BaseException) -> list[str]:
    """What is noted on this error of a trainer call."""
    with pytest.raises(type(error)) as caught, first_failure_named():
        raise error
    assert caught.value is error
    return list(getattr(error, "__notes__", []))


def fail_in_turn(rank: int, world_size: int, errors: list[BaseException]) -> list[str]:
    """What is noted on errors[rank], raised by rank 1 first and then by the others."""
    store = dist.distributed_c10d._get_default_store()
    if rank != 1:
        store.get("failed")
    notes = notes_of(errors[rank])
    store.set("failed", "1")
    return notes


def test_the_rank_that_failed_first_is_named_on_the_others_with_its_error(on_ranks: Any) -> None:
    errors = [RuntimeError("Connection closed by peer"), ValueError("came to grief\nand more"), SIGTERMException(143)]
    first, none, terminated = on_ranks(fail_in_turn, 3, errors)
    assert len(first) == 1 and first[0].startswith("Rank 1 of host ") and not none and not terminated
    assert first[0].endswith(" failed first: ValueError: came to grief")


def test_what_all_ranks_refuse_is_blamed_on_nobody(on_ranks: Any) -> None:
    assert on_ranks(fail_in_turn, 2, [ValueError("refused"), ValueError("refused")]) == [[], []]


def lose_the_store(rank: int, world_size: int) -> tuple[list[str], float]:
    """What is noted on the error of a rank whose store does not answer; and how long that took."""

    class Silent:
        def clone(self) -> None:
            time.sleep(60)

    begin = time.monotonic()
    # The process serves other tests after this one.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist.distributed_c10d, "_get_default_store", Silent)
        return notes_of(RuntimeError("Connection closed by peer")), time.monotonic() - begin


def test_a_store_that_is_silent_holds_no_error_back(on_ranks: Any) -> None:
    for notes, seconds in on_ranks(lose_the_store, 2):
        assert not notes and seconds < 10


def test_torchrun_gets_the_error_with_its_notes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    error = RuntimeError("lost")
    error.add_note("what it means")
    assert notes_of(error) == ["what it means"]
    assert json.loads(file.read_text())["message"]["extraInfo"]["py_callstack"].endswith(
        "RuntimeError: lost\nwhat it means\n"
    )
