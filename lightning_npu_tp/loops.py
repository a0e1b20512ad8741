"""Lightning's training epoch without the stall that it puts before every batch.

To learn of a SIGTERM, Lightning broadcasts a flag over all ranks before each batch and reads it on the
host, which drains an accelerator's queue. The launcher's signal watch ends all ranks by itself, so the
flag has no reader here.
"""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


class TrainingEpochLoop(_TrainingEpochLoop):
    """Lightning's loop over the batches of an epoch; asks nobody for signals."""

    def _broadcast_sigterm_tensor(self) -> None:
        pass


def use_quiet_epoch_loop(trainer: Trainer) -> None:
    """Put `TrainingEpochLoop` in the place of the trainer's own, with all its state; a loop of a user's stays."""
    stock = trainer.fit_loop.epoch_loop
    if type(stock) is _TrainingEpochLoop:
        loop = TrainingEpochLoop(trainer)
        # Progress, results and the validation loop: a trainer may have run before.
        loop.__dict__.update(stock.__dict__)
        trainer.fit_loop.epoch_loop = loop
