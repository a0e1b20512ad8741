"""Lightning's training epoch without the stall that it puts before every batch.

To learn of a SIGTERM, Lightning broadcasts a flag over all ranks before each batch and reads it on the
host, which drains an accelerator's queue. The launcher's signal watch ends all ranks by itself, so the
flag has no reader here. And a validation does not change the random numbers of training.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from lightning_npu_tp.checkpoint.rank_state import apply_rank_state, collect_rank_state


class TrainingEpochLoop(_TrainingEpochLoop):
    """Lightning's loop over the batches of an epoch; asks nobody for signals."""

    def _broadcast_sigterm_tensor(self) -> None:
        pass

    def advance(self, data_fetcher: Any) -> None:
        """One batch. A resumed run first winds the validation loop on, whose loaders draw random numbers."""
        strategy: Any = self.trainer.strategy
        if self.restarting and self._should_check_val_fx(data_fetcher) and hasattr(strategy, "state_of_first_batch"):
            strategy.state_of_first_batch = collect_rank_state(self.trainer)
        super().advance(data_fetcher)

    def on_advance_end(self, data_fetcher: Any) -> None:
        """The end of a batch, with a validation where one is due; it leaves the generators of training as they are.

        Lightning leaves out a validation that was due when a checkpoint was saved just before it, so a resumed run
        would draw other numbers after it.
        """
        if self._should_check_val_fx(data_fetcher):
            state = collect_rank_state(self.trainer)
            super().on_advance_end(data_fetcher)
            apply_rank_state(self.trainer, state)
        else:
            super().on_advance_end(data_fetcher)
        after_step = getattr(self.trainer.strategy, "after_step", None)
        if after_step is not None and not self._should_accumulate():
            after_step()


def use_quiet_epoch_loop(trainer: Trainer) -> None:
    """Put `TrainingEpochLoop` in the place of the trainer's own, with all its state; a loop of a user's stays."""
    stock = trainer.fit_loop.epoch_loop
    if type(stock) is _TrainingEpochLoop:
        loop = TrainingEpochLoop(trainer)
        # Progress, results and the validation loop: a trainer may have run before.
        loop.__dict__.update(stock.__dict__)
        trainer.fit_loop.epoch_loop = loop
