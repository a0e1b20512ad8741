"""Checkpoints that are asked for while an optimizer step is half made, and are saved when it is whole.

A checkpoint holds no gradients: one that is taken between two accumulated micro-batches, or inside of one, would lose
what was accumulated, and the batch. ModelCheckpoint asks for such ones by its time interval, after validations that
fall between, and users from any hook. Here they wait for the end of the step, and removals that make room for them wait
with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus


def step_is_half_made(trainer: Trainer) -> bool:
    """Whether training stands inside a micro-batch, or between two of one optimizer step; the same on every rank."""
    if trainer.state.fn != TrainerFn.FITTING:
        return False
    loop = trainer.fit_loop.epoch_loop
    current: Any = loop.batch_progress.current
    return current.processed < current.ready or loop._should_accumulate()


def goes_on(trainer: Trainer) -> bool:
    """Whether the step will come to its end: the trainer call has neither ended nor failed."""
    return trainer.state.status == TrainerStatus.RUNNING


class DeferredSaves:
    """The checkpoints that wait for the end of the step, in order, and the removals that wait for them."""

    def __init__(self) -> None:
        self._saves: list[Path] = []
        self._removals: list[Path] = []

    def add(self, path: Path) -> None:
        """Have a checkpoint saved at the end of the step; once, however often it is asked for."""
        if path in self._removals:
            self._removals.remove(path)
        if path not in self._saves:
            self._saves.append(path)

    def remove(self, path: Path) -> bool:
        """Take note that a checkpoint is to be removed; False where nothing waits and it can be done now."""
        if path in self._saves:
            self._saves.remove(path)
            return True
        if not self._saves:
            return False
        self._removals.append(path)
        return True

    def take(self) -> tuple[list[Path], list[Path]]:
        """What is to be saved now, and to be removed after that; nothing waits any more."""
        taken = self._saves, self._removals
        self._saves, self._removals = [], []
        return taken
