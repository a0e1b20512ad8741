"""`TokensPerSecond`: training throughput of the whole run, validation and checkpoints excluded.

Measured on the host over a window of batches, without a device synchronisation: over a window the
host can run ahead of the device by a few batches at most.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_npu_tp.errors import ConfigError


class TokensPerSecond(Callback):
    """Logs train/tokens_per_second: tokens of all data ranks, per second of training.

    window: batches to measure over, at least 1. The first batch, which compiles and warms caches, only
            starts the clock.
    key:    entry of a batch dict whose elements are the tokens.
    """

    def __init__(self, window: int = 20, key: str = "input_ids") -> None:
        if window < 1:
            raise ConfigError(f"TokensPerSecond(window={window}) measures nothing. Set window to 1 or more.")
        self.window = window
        self.key = key
        self._restart()

    def _restart(self) -> None:
        # (seconds of training, tokens), both since the start, at the end of each batch.
        self._marks: deque[tuple[float, int]] = deque(maxlen=self.window + 1)
        self._tokens = 0
        self._away = 0.0
        self._left_at: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new measurement."""
        self._restart()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._left_at = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the clock run on."""
        if self._left_at is not None:
            self._away += time.perf_counter() - self._left_at
            self._left_at = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch and log the rate."""
        self._tokens += batch[self.key].numel() * _data_ranks(trainer)
        self._marks.append((time.perf_counter() - self._away, self._tokens))
        (start, tokens_before), (stop, tokens_now) = self._marks[0], self._marks[-1]
        if stop > start:
            pl_module.log("train/tokens_per_second", (tokens_now - tokens_before) / (stop - start))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A window that holds a checkpoint would measure the disk: begin a new one."""
        self._marks.clear()


def _data_ranks(trainer: Trainer) -> int:
    """Number of ranks with batches of their own; tensor ranks share theirs."""
    kwargs = trainer.distributed_sampler_kwargs
    return 1 if kwargs is None else int(kwargs["num_replicas"])
