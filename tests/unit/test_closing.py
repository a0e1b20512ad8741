"""The end of a run that failed. Catches a teardown whose own failure hides why the run failed, a step that is left out
after another one raised, and a failure of teardown that nobody hears of."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.distributed.tensor import distribute_module

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.closing import close_all
from lightning_npu_tp.hccl.faults import DeviceFault
from lightning_npu_tp.signals import TERMINATED, SignalWatch


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("in_training", [True, False])
def test_the_error_that_is_told_is_the_first_one(in_training: bool):
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=NPUTensorParallelStrategy(convert=lambda module, meshes: distribute_module(module, meshes.dense)),
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    kind, code = (DeviceFault, "507015: an operator on a matrix core") if in_training else (RuntimeError, "507018")
    with pytest.raises(kind, match=code):
        trainer.fit(BrokenDevice(in_training=in_training))
    # What comes after the step that failed was done as well.
    assert not torch.distributed.is_initialized()


def test_a_rank_is_ended_after_its_time_also_where_nobody_could_be_told():
    ended: list[int] = []
    watch = SignalWatch(on_sigterm=lambda: None, grace_seconds=0.0, notice=refuse, end=ended.append)
    with pytest.raises(RuntimeError, match="the device is gone"):
        watch._after_sigterm()
    assert ended == [TERMINATED]
