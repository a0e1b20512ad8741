"""`LossFreeBalance`: runs the loss-free update of the routers' selection bias once per optimizer step.

Only the moment and the ranks are decided here; the rule is `lightning_npu_tp.models.moe.bias`. The bias itself
is a buffer of the model and travels in its checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.models.moe.bias import biased_blocks, clear_pending, update_bias


class LossFreeBalance(Callback):
    """After each optimizer step: bias += rate * sign(mean load - load), loads of the step's training tokens.

    rate: size of a step, above 0; the authors use 0.001, scores lie between 0 and 1.

    Counts every micro-batch of an accumulation window, a short last one included, over all ranks. A
    checkpoint of a step holds the bias after it. Raises ConfigError at the start of training where no
    router has a bias to update.
    """

    def __init__(self, rate: float = 1e-3) -> None:
        if not rate > 0:
            raise ConfigError(f"LossFreeBalance(rate={rate}) balances nothing. Set rate above 0, e.g. 0.001.")
        self.rate = rate
        self._blocks: list[Any] = []
        self._last_step: int | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers."""
        self._blocks = list(biased_blocks(pl_module).values())
        if not self._blocks:
            raise ConfigError(
                f"LossFreeBalance needs routers with a selection bias, and {type(pl_module).__name__} has none. Use a "
                f"model with topk_method=noaux_tc (DeepSeek-V3) or selection_bias=true, or leave the callback out."
            )

        self._last_step = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start from nothing: a warm-up, or a fit that was broken off inside a window, may have counted."""
        # Not when the epoch starts: a fit resumed inside one never passes there.
        if self._last_step is None:
            clear_pending(self._blocks)
            self._last_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after a batch that finished an optimizer step; checkpoint callbacks come later."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            update_bias(self._blocks, self.rate, reduce=_sum_over_world)


def _sum_over_world(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place; ranks that count the same tokens only scale it."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
