"""What a resumed fit has still to do and to put back: one object, which its strategy and its loops share.

A checkpoint is taken in the middle of the end of a batch: the step is made, but its validation and the schedulers that
look at it come after. Lightning forgets them when it resumes; here the checkpoint says what is left, and the resumed
run begins with that. The strategy fills the object while it loads, the loops (loops.py) work it off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelCheckpoint

from lightning_npu_tp.checkpoint.rank_state import apply_rank_state, collect_rank_state

# What is left of the batch at which a checkpoint was taken: its validation and what follows, only what follows
# (schedulers that look at metrics, counters), nothing.
VALIDATION, END, NOTHING = "validation", "end", "nothing"


@dataclass
class Resume:
    """One fit's; nothing is set in a fit that begins anew.

    left:       VALIDATION, END or NOTHING of the checkpoint's batch, until that is done; None for a checkpoint that
                does not say, too.
    deferred:   for each ModelCheckpoint, whether it waited for that validation to save.
    inside:     this rank's state in the checkpoint (see `collect_rank_state`), for the first batch of a run that goes
                on inside of an epoch.
    first:      what the first batch of an epoch is to find instead of what there is.
    validating: while a validation runs inside of training, this rank's state with which training goes on.
    """

    left: str | None = None
    deferred: list[bool] | None = None
    inside: dict[str, Any] | None = None
    first: dict[str, Any] | None = None
    validating: dict[str, Any] | None = None

    @property
    def batch_is_open(self) -> bool:
        """Whether the checkpoint's batch is still to be ended."""
        return self.left in (VALIDATION, END)

    def before_batch(self, trainer: Trainer, batch_idx: int) -> None:
        """Let the first batch of a resumed run draw the random numbers that it would have drawn.

        Inside an epoch the loaders' iterators, which are made anew, drew random numbers that the uninterrupted run drew
        earlier. At an epoch's beginning they are made in either run, and only what else drew is undone.
        """
        state = self.inside if batch_idx > 0 else self.first
        self.inside = self.first = None
        if state is not None:
            apply_rank_state(trainer, state)

    @contextmanager
    def validation(self, trainer: Trainer) -> Iterator[None]:
        """Around a validation inside of training: generators are as before after it, and in what is saved meanwhile."""
        self.validating = state = collect_rank_state(trainer)
        try:
            yield
        finally:
            self.validating = None
        apply_rank_state(trainer, state)

    def tell_savers(self, trainer: Trainer) -> None:
        """Give each ModelCheckpoint back what it does not save: for which step it has saved, or that it waits.

        Otherwise it would save the step of the checkpoint once more, within the next one.
        """
        found, deferred = savers(trainer), self.deferred
        self.deferred = None
        if deferred is None:
            return
        for number, saver in enumerate(found):
            if len(deferred) == len(found) and deferred[number]:
                saver._defer_save_until_validation = True
            elif saver._every_n_train_steps >= 1 and trainer.global_step % saver._every_n_train_steps == 0:
                saver._last_global_step_saved = trainer.global_step


def restore_finetuning(trainer: Trainer, states: Mapping[str, Any]) -> None:
    """Let the finetuning callbacks make the parameter groups of a checkpoint, before the optimizers' states are loaded.

    Lightning has them do so in `on_fit_start`, and gives them their states only after that where weights are loaded
    after setup.
    states: of all callbacks, by their keys.
    """
    for callback in _finetuning(trainer):
        if callback.state_key in states:
            callback.load_state_dict(deepcopy(states[callback.state_key]))
            BaseFinetuning.on_fit_start(callback, trainer, trainer.lightning_module)


def end_finetuning_restart(trainer: Trainer) -> None:
    """Once training begins: the next fit's optimizers are not to get the groups of this one's checkpoint."""
    for callback in _finetuning(trainer):
        callback._restarting = False


def _finetuning(trainer: Trainer) -> list[BaseFinetuning]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, BaseFinetuning)]


def save_last_step(trainer: Trainer) -> None:
    """At the end of training: let each `last.ckpt` be of the step at which it ended, whatever ended it.

    ModelCheckpoint writes it beside the checkpoints that its settings ask for, so an end between two of those would be
    in none. Where its last one is of this step nothing is saved again. What it monitors and its best ones stay as
    they are.
    """
    for saver in savers(trainer):
        if saver.save_last and not saver._should_skip_saving_checkpoint(trainer):
            # Otherwise save_last="link" would link to the one of the earlier step.
            saver._last_checkpoint_saved = ""
            saver._save_last_checkpoint(trainer, saver._monitor_candidates(trainer))


def savers(trainer: Trainer) -> list[ModelCheckpoint]:
    """The trainer's ModelCheckpoint callbacks, in order."""
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
