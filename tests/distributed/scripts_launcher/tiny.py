"""A two-rank training job that does almost nothing, for the scripts beside this file."""

import os
import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_npu_tp.launcher import ProcessLauncher, check_world


class TinyStrategy(DDPStrategy):
    """Stock data parallelism on the launcher under test."""

    def _configure_launcher(self):
        check_world(self.cluster_environment, self.num_processes, self.num_nodes)
        self._launcher = ProcessLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def barrier(self, name=None):
        super().barrier(name)
        if name == "run-stage":
            self.launcher.watch_signals()


class TinyModel(LightningModule):
    """One linear layer; `at_step(model, step)` runs in every training step."""

    def __init__(self, at_step=None):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.at_step = at_step

    def training_step(self, batch, batch_idx):
        note_pid()
        if self.at_step is not None:
            self.at_step(self, self.global_step)
        return self.layer(batch[0]).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.layer(batch[0]).sum(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)

    val_dataloader = train_dataloader


def tiny_trainer(devices=2, max_steps=2, **settings):
    """A silent CPU trainer."""
    return Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=TinyStrategy(process_group_backend="gloo", cluster_environment=LightningEnvironment()),
        max_steps=max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        **settings,
    )


def is_first():
    """Whether this process is the one that the user started."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def note_pid():
    """Leave this process's number where the test looks for processes that outlived the run."""
    open(os.path.join(os.environ["PIDS"], str(os.getpid())), "w").close()


note_pid()
torch.set_num_threads(1)
sys.stdout.reconfigure(line_buffering=True)
