"""What the tests on cards share: a tiny mixture model, trained by a Trainer on cards or on the CPU."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import DeepseekV2ForCausalLM

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.tools.testing.models import tiny_deepseek_v2_config
from lightning_npu_tp.tools.testing.operators import CountOperators

# Float32 sums of a few dozen products in another order, through a whole model.
FLOAT32 = 1e-5
# The bound on losses over steps.
LOSSES = 1e-4


class Module(LightningModule):
    """Knows nothing of sharding."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.model = DeepseekV2ForCausalLM(tiny_deepseek_v2_config(aux_loss_alpha=0.001))
        self.losses: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = self.model(**batch)
        self.losses.append(self.trainer.strategy.reduce(output.loss))
        return output.loss + output.aux_loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class CountLastStep(Callback):
    """What each batch but the first asks the host, forward to optimizer."""

    def __init__(self, device_type: str) -> None:
        self.device_type, self.found = device_type, []
        self.counter: CountOperators | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx > 0:
            self.counter = CountOperators(self.device_type).__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.found += [str(sighting) for sighting in self.counter.found()]
            self.counter = None


class SaveAfter(Callback):
    """Saves a checkpoint after the second step, in the middle of an epoch."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


@dataclass
class Fit:
    """losses: of each step, over all data ranks. sightings: what the steps asked the host. val_loss: at the end."""

    losses: list[float]
    val_loss: float
    sightings: list[str] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    allocated: int = 0


def batches(sequences: int, data_rank: int) -> DataLoader:
    """A data rank's part of four sequences, the same in every step; page-locked."""
    ids = torch.randint(2, 128, (4, 24), generator=torch.Generator().manual_seed(3))
    own = ids[data_rank * sequences : (data_rank + 1) * sequences]
    rows = [{"input_ids": row, "labels": row} for row in own] * 6
    return DataLoader(rows, batch_size=sequences, pin_memory=True)  # type: ignore[arg-type]


def fit(
    rank: int,
    world_size: int,
    device_type: str,
    steps: int = 3,
    sequences: int = 4,
    resume: str | None = None,
    save: str | None = None,
    weights: bool = False,
    trainer: dict[str, Any] | None = None,
    **strategy: Any,
) -> Fit:
    """Train on this rank; 3 steps of 4 sequences over all data ranks.

    sequences: of a data rank's batch. resume, save: checkpoints to go on from, and to write after two steps.
    """
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    module, count = Module(), CountLastStep(device_type)
    run = Trainer(
        accelerator=device_type,
        devices=world_size,
        strategy=NPUTensorParallelStrategy(init_seed=0, **strategy),
        callbacks=[count, *([SaveAfter(save)] if save else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
        **{"max_steps": steps, **(trainer or {})},
    )
    data = batches(sequences, rank // run.strategy.layout.tensor)
    run.fit(module, data, ckpt_path=resume)
    losses = [float(loss) for loss in module.losses]
    result = Fit(losses=losses, val_loss=0.0, sightings=count.found)
    result.val_loss = float(run.validate(module, data, verbose=False)[0]["val_loss"])
    if weights:
        with run.strategy.process_group():
            result.weights = {name: whole(p).cpu() for name, p in module.named_parameters()}
    return result


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def distance(actual: Tensor, wanted: Tensor) -> float:
    """Relative to the norm of what is wanted; nan where anything is not a number."""
    actual, wanted = (t.detach().cpu().double() for t in (actual, wanted))
    assert actual.shape == wanted.shape
    return float((actual - wanted).norm() / wanted.norm().clamp(min=1e-30))
