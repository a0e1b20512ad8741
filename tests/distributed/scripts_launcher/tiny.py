"""A training job that does almost nothing, for the scripts beside this file."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_npu_tp.launch.launcher import ProcessLauncher, check_world


class TinyStrategy(DDPStrategy):
    """Lightning's data parallelism on the launcher under test."""

    def _configure_launcher(self):
        check_world(self.cluster_environment, self.num_processes, self.num_nodes)
        self._launcher = ProcessLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def barrier(self, name=None):
        super().barrier(name)
        if name == "run-stage":
            self.launcher.watch_signals()


class TinyModel(LightningModule):
    """One linear layer; `at_step(model, step)` runs at the begin of every training step."""

    def __init__(self, at_step):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.at_step = at_step

    def training_step(self, batch, batch_idx):
        self.at_step(self, self.global_step)
        return self.layer(batch[0]).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.layer(batch[0]).sum(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)

    val_dataloader = train_dataloader


def tiny_trainer(devices=2, max_steps=2):
    """A silent trainer on the CPU."""
    return Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=TinyStrategy(process_group_backend="gloo"),
        max_steps=max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=1,
    )
