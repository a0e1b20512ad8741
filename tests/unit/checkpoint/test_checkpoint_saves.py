"""The order of saves and removals: one in flight, nothing removed for a save that failed, every failure told.

Catches a pruned checkpoint whose successor never came to be, a stand-in that stays for ever, and a failure in the
background that nobody hears of.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.checkpoint import training_state, writer
from lightning_npu_tp.checkpoint.locks import hold
from lightning_npu_tp.checkpoint.peers import Peers
from lightning_npu_tp.checkpoint.saves import Saves
from lightning_npu_tp.errors import CheckpointError, ConfigError


class Disk:
    """Saves are folders in `folder`; those in `broken` fail; `gate` holds back those in the background."""

    def __init__(self, folder: Path, *, stop: bool = False, background: bool = False) -> None:
        self.folder, self.background, self.saves = folder, background, Saves(stop=stop)
        self.gate = threading.Event()
        self.gate.set()

    def save(self, name: str, error: BaseException | None = None) -> None:
        def work() -> None:
            assert self.gate.wait(10)
            if error is not None:
                raise error
            (self.folder / name).mkdir(exist_ok=True)

        self.saves.run(self.folder / name, work, background=self.background)

    def remove(self, name: str) -> None:
        self.saves.remove(self.folder / name)

    @property
    def names(self) -> list[str]:
        return sorted(entry.name for entry in self.folder.iterdir())


FULL = CheckpointError("no room")
TOLD = "ignore:.*(no room|is kept)"


@pytest.mark.filterwarnings(TOLD)
@pytest.mark.parametrize("background", [False, True])
def test_a_stand_in_stays_until_a_save_succeeds_and_then_goes(tmp_path: Path, background: bool) -> None:
    disk = Disk(tmp_path, background=background)
    disk.save("a")
    disk.save("b", FULL)
    disk.remove("a")
    disk.saves.wait()
    assert disk.names == ["a"]
    disk.save("last")
    disk.saves.wait()
    assert disk.names == ["a", "last"], "another checkpoint is no successor"
    disk.save("c", FULL)
    disk.remove("b")
    disk.saves.wait()
    assert disk.names == ["a", "last"]
    disk.save("d")
    disk.remove("c")
    disk.saves.wait()
    assert disk.names == ["d", "last"]


def test_removals_wait_for_the_save_in_flight(tmp_path: Path) -> None:
    disk = Disk(tmp_path, background=True)
    disk.save("a")
    disk.saves.wait()
    disk.gate.clear()
    disk.save("b")
    disk.remove("a")
    assert disk.names == ["a"]
    disk.gate.set()
    disk.saves.wait()
    assert disk.names == ["b"]


def test_one_save_is_in_flight_and_the_next_waits(tmp_path: Path) -> None:
    disk = Disk(tmp_path, background=True)
    disk.gate.clear()
    disk.save("a")
    threading.Timer(0.05, disk.gate.set).start()
    disk.save("b")
    assert "a" in disk.names
    disk.saves.wait()


@pytest.mark.parametrize("background", [False, True])
def test_a_failure_stops_the_run_at_the_latest_with_the_next_save(tmp_path: Path, background: bool) -> None:
    disk = Disk(tmp_path, stop=True, background=background)
    with pytest.raises(CheckpointError, match="no room"):
        disk.save("a", FULL)
        disk.save("b")
    assert disk.names == []
    disk.save("c")
    disk.saves.wait()
    assert disk.names == ["c"]


def test_a_failure_that_the_run_survives_is_told_at_once_and_at_its_end(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with pytest.warns(UserWarning, match="The run goes on without a checkpoint .*on_save_error=continue.* no room"):
        disk.save("a", FULL)
    disk.save("b")
    with pytest.warns(UserWarning, match=r"1 of 2 checkpoints of this run were not saved: .*a \(no room\)"):
        disk.saves.report()
    disk.saves.report()


def test_what_is_no_failure_to_save_is_never_survived(tmp_path: Path) -> None:
    disk = Disk(tmp_path, background=True)
    disk.save("a", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        disk.saves.wait()


def test_a_checkpoint_that_is_being_read_is_not_removed(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.save("a")
    disk.save("b")
    with hold(tmp_path / "a", "reading"):
        with pytest.warns(UserWarning, match="a is kept: process .* is reading it"):
            disk.remove("a")
    assert disk.names == ["a", "b"]


def test_a_copy_shares_no_memory_with_what_training_changes() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = [
        training_state.model_state(model),
        training_state.optimizer_state(model, optimizer),
    ]
    assert state[0]["weight"].data_ptr() == model.weight.data_ptr(), "nothing to protect against"
    own = torch.ones(3)
    copy, (kept,) = (
        training_state.detached(state, model, [optimizer]),
        training_state.detached([own], model, [optimizer]),
    )
    before = [leaf.clone() for leaf in torch.utils._pytree.tree_leaves(copy) if isinstance(leaf, torch.Tensor)]
    optimizer.step()
    after = [leaf for leaf in torch.utils._pytree.tree_leaves(copy) if isinstance(leaf, torch.Tensor)]
    assert len(before) == 8 and all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert kept is own, "a second copy of what is not live"


def test_a_setting_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="on_save_error='ignore' does not exist.* to stop or continue"):
        NPUTensorParallelStrategy(on_save_error="ignore")  # type: ignore[arg-type]


def test_a_device_that_fails_in_a_save_is_explained_instead_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("NPU function error: aclrtSynchronizeStream, error code is 507015")

    monkeypatch.setattr(writer, "_write_part", fail)
    with pytest.raises(CheckpointError) as caught:
        writer.save_folder({}, b"", b"", tmp_path / "step=1.ckpt", None, Peers())  # type: ignore[arg-type]
    told = str(caught.value)
    assert "507015: an operator on a matrix core failed" in told and "token ids and labels" in told
    assert "It needs" not in told and "earlier checkpoints are as they were" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", [False, True])
def test_what_makes_room_for_a_checkpoint_that_waits_goes_only_once_that_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    strategy, seen = NPUTensorParallelStrategy(), []
    old, new, never = (tmp_path / name for name in ("old.ckpt", "new.ckpt", "never.ckpt"))
    old.mkdir()

    def save(path: Path) -> None:
        seen.append((path, old.exists()))
        if fails:
            raise FULL

    module = SimpleNamespace(trainer=SimpleNamespace(save_checkpoint=save))
    monkeypatch.setattr(NPUTensorParallelStrategy, "_module", module)
    for path in (never, new, new):
        strategy._deferred.add(path)
    # Of two that are asked for within one step, ModelCheckpoint may keep one.
    strategy.remove_checkpoint(never)
    strategy.remove_checkpoint(old)
    assert old.exists()
    if fails:
        with pytest.raises(CheckpointError):
            strategy._save_deferred()
    else:
        strategy._save_deferred()
    assert seen == [(new, True)] and old.exists() == fails
    strategy._save_deferred()
    assert len(seen) == 1
    strategy.remove_checkpoint(old)
    assert not old.exists()
