"""The end of a run that failed. Catches a teardown whose own failure hides why the run failed, a step that is left out
after another one raised, and a failure of teardown that nobody hears of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch.distributed.tensor import distribute_module

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.errors import CheckpointError, RankFailure
from lightning_npu_tp.launch.signals import TERMINATED, SignalWatch
from lightning_npu_tp.trainer.explain_error import may_hang
from lightning_npu_tp.trainer.loops import move_results_to_host
from lightning_npu_tp.trainer.teardown import close_all


def refuse() -> None:
    raise RuntimeError("the device is gone\nsecond line")


def test_all_steps_run_and_the_first_failure_is_raised_after_them():
    ran: list[str] = []
    with pytest.raises(RuntimeError, match="the device is gone"):
        close_all((refuse, lambda: ran.append("last")), failing=False)
    assert ran == ["last"]


def test_where_another_error_is_on_its_way_a_failure_is_a_warning():
    ran: list[str] = []
    with pytest.warns(UserWarning, match="While the failed run was closed: RuntimeError: the device is gone$"):
        close_all((refuse, lambda: ran.append("last")), failing=True)
    assert ran == ["last"]


class BrokenDevice(LightningModule):
    """Trains until the device fails; after that it refuses everything, as a card does."""

    def __init__(self, *, in_training: bool) -> None:
        super().__init__()
        self.layer, self.in_training, self.failed = torch.nn.Linear(2, 1), in_training, False

    def training_step(self, batch, batch_idx):
        if self.in_training:
            self.failed = True
            raise RuntimeError("NPU function error: aclrtMemcpy, error code is 507015")
        return self.layer.weight.to_local().sum()

    def on_train_end(self):
        self.failed = True

    def cpu(self):
        if self.failed:
            raise RuntimeError("NPU function error: aclrtMemcpy, error code is 507018")
        return super().cpu()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(2, 2))


def trainer_of_one_step() -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        strategy=NPUTensorParallelStrategy(convert=lambda module, meshes: distribute_module(module, meshes.dense)),
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("in_training", [True, False])
def test_the_error_that_is_told_is_the_first_one(in_training: bool):
    trainer = trainer_of_one_step()
    with pytest.raises(RuntimeError, match="507015" if in_training else "507018") as caught:
        trainer.fit(BrokenDevice(in_training=in_training))
    (note,) = caught.value.__notes__
    assert ("507015: an operator on a matrix core" in note) is in_training
    # What comes after the step that failed was done as well.
    assert not torch.distributed.is_initialized()


def results_of(value: torch.Tensor) -> Any:
    results = _ResultCollection(training=True)
    results.log("training_step", "loss", value, on_step=True, on_epoch=False)
    return results


class Unreadable(torch.Tensor):
    """What lies on a card that has failed; `asked` counts who tried to get it."""

    asked = 0

    @property
    def device(self):
        return torch.device("cuda", 0)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            Unreadable.asked += 1
            raise RuntimeError("the device is gone")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(("lost", "asked"), [(True, 0), (False, 4)])
def test_what_was_logged_on_a_failed_card_is_let_go_before_lightning_asks_for_it(lost: bool, asked: int):
    Unreadable.asked = 0
    broken, fine = results_of(torch.ones(())), results_of(torch.ones(()))
    for metric in broken.result_metrics:
        metric.value = metric.value.as_subclass(Unreadable)
    epochs = SimpleNamespace(_results=broken, val_loop=SimpleNamespace(_results=fine))
    on_card, here = torch.ones(()).as_subclass(Unreadable), torch.ones(())
    logged = [{"a": on_card, "b": here, "c": 1.0} for _ in range(3)]
    names = ("_progress_bar_metrics", "_logged_metrics", "_callback_metrics")
    trainer = SimpleNamespace(_active_loop=SimpleNamespace(epoch_loop=epochs))
    trainer._logger_connector = SimpleNamespace(**dict(zip(names, logged, strict=True)))
    move_results_to_host(trainer, lost=lost)
    assert logged == [{"b": here, "c": 1.0}] * 3
    assert not broken and Unreadable.asked == asked
    assert bool(fine) is not lost


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("device", "asked"), [("cuda", []), ("cpu", ["weights"])])
def test_a_card_that_failed_is_asked_for_nothing(monkeypatch, device: str, asked: list[str]):
    told: list[str] = []

    class Job(BrokenDevice):
        def cpu(self):
            told.append("weights")

        def training_step(self, batch, batch_idx):
            self.log("something", torch.ones(()))
            return super().training_step(batch, batch_idx)

    trainer = trainer_of_one_step()
    on_exception = NPUTensorParallelStrategy.on_exception

    def as_on_a_card(self, exception):
        # Only there and then is this run one on a card.
        with monkeypatch.context() as patch:
            patch.setattr(NPUTensorParallelStrategy, "root_device", torch.device(device))
            on_exception(self, exception)

    monkeypatch.setattr(NPUTensorParallelStrategy, "on_exception", as_on_a_card)
    with pytest.raises(RuntimeError, match="507015"):
        trainer.fit(Job(in_training=True))
    assert told == asked
    assert bool(trainer.fit_loop.epoch_loop._results) is (device == "cpu")
    # The next run with this strategy is another one.
    assert not trainer.strategy._card_failed


def test_full_memory_leaves_a_card_that_can_be_asked():
    assert may_hang(RuntimeError("error code is 507015")) and may_hang(RuntimeError("error code is 507048"))
    assert may_hang(RankFailure("x"))
    for full in (torch.OutOfMemoryError("full"), RuntimeError("NPU out of memory. Tried to allocate 1 MiB")):
        assert not may_hang(full)
    assert not may_hang(ValueError("x")) and not may_hang(CheckpointError("rank 1: error code is 507015"))


def test_a_rank_is_ended_after_its_time_also_where_nobody_could_be_told():
    ended: list[int] = []
    watch = SignalWatch(on_sigterm=lambda: None, grace_seconds=0.0, notice=refuse, end=ended.append)
    with pytest.raises(RuntimeError, match="the device is gone"):
        watch._after_sigterm()
    assert ended == [TERMINATED]
