"""`TrainingProgressBar`: loss, tokens per second and learning rate; lines where there is no terminal.

Lightning's rich bar counts an epoch's batches, which says nothing when max_steps ends the run in the
first epoch, and shows nothing at all in a log file. It shows what others log and measures nothing.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console
from typing_extensions import override


class TrainingProgressBar(RichProgressBar):
    """A rich progress bar for runs that are counted in optimizer steps.

    every_n_steps:       how often the numbers are read; each reading waits for the device.
    lines_every_n_steps: without a terminal, how often a plain line is printed; 0 prints none.
    refresh_rate:        redraws per second.
    """

    def __init__(self, every_n_steps: int = 5, lines_every_n_steps: int = 50, refresh_rate: int = 4) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.every_n_steps = every_n_steps
        self.lines_every_n_steps = lines_every_n_steps
        self._shown: dict[str, str] = {}
        self._last_line = -1
        self._lines = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose between the bar and lines; only rank 0 shows anything."""
        super().setup(trainer, pl_module, stage)
        on_terminal = get_console().is_terminal
        self._lines = trainer.is_global_zero and not on_terminal and self.lines_every_n_steps > 0
        if not on_terminal:
            self.disable()

    @property
    @override
    def total_train_batches(self) -> int | float:
        """Batches of this epoch until its end or that of the run, whichever comes first; asked as an epoch begins."""
        trainer = self.trainer
        batches = trainer.num_training_batches
        if trainer.max_steps < 0 or not batches:
            return batches
        # Not 0 when resumed in the middle of an epoch; the count of the last epoch is still there when the next begins.
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready % batches
        return min(batches, done + (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands behind the bar, as text."""
        if not self._shown or trainer.global_step % self.every_n_steps == 0:
            self._shown = _numbers(trainer)
        return dict(self._shown)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, or print a line."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        step = trainer.global_step
        due = step == 1 or step == trainer.max_steps or (self._lines and step % self.lines_every_n_steps == 0)
        if self._lines and due and step != self._last_line:
            self._last_line = step
            total = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
            numbers = ", ".join(f"{name} {value}" for name, value in _numbers(trainer).items())
            print(f"step {step}{total}: {numbers}", flush=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In lines: what validation within training found."""
        super().on_validation_end(trainer, pl_module)
        loss = trainer.callback_metrics.get("val/loss")
        if self._lines and trainer.state.fn == "fit" and not trainer.sanity_checking and loss is not None:
            print(f"step {trainer.global_step}: validation loss {float(loss):.4f}", flush=True)


def _numbers(trainer: Trainer) -> dict[str, str]:
    """Loss, speed and learning rate as far as they are known."""
    found: dict[str, str] = {}
    metrics = trainer.callback_metrics
    if (loss := metrics.get("train/loss")) is not None:
        found["loss"] = f"{float(loss):.4f}"
    if (speed := metrics.get("train/tokens_per_second")) is not None:
        found["tokens/s"] = f"{float(speed):,.0f}"
    if trainer.optimizers:
        found["lr"] = f"{trainer.optimizers[0].param_groups[0]['lr']:.2e}"
    return found
