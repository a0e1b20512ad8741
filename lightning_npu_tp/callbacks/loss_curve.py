"""`LossCurve`: a picture of the training and validation loss when training ends.

Rank 0 collects the logged losses and draws once. A picture that cannot be written is reported and never
ends the run: what was trained is worth more. matplotlib is wanted only by whoever uses this callback.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.trainer.explain_error import may_hang

log = logging.getLogger(__name__)

# Losses stay on the device until so many have gathered; each move waits for it.
_CHUNK = 1000


class LossCurve(Callback):
    """Writes a PNG of train/loss and val/loss over optimizer steps to `path`.

    path:      of the file; its folder is made if need be.
    train_key: name under which the training loss is logged. val_key: the same for validation.

    Raises ConfigError on construction where matplotlib is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], train_key: str = "train/loss", val_key: str = "val/loss") -> None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ConfigError(
                "LossCurve needs matplotlib, which is not installed. Run `pip install 'lightning-npu-tp[train]'`, or "
                "leave the callback out (callbacks.loss_curve=null)."
            )
        self.path = Path(path)
        self.train_key = train_key
        self.val_key = val_key
        self._train: list[tuple[int, float]] = []
        self._val: list[tuple[int, float]] = []
        self._waiting: list[tuple[int, Tensor]] = []
        self._last_step = 0

    def begin_with(self, train: list[tuple[int, float]], val: list[tuple[int, float]]) -> None:
        """Take over what an earlier part of the run noted: (optimizer step, loss)."""
        self._train, self._val, self._waiting = list(train), list(val), []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss of a finished optimizer step."""
        loss = trainer.callback_metrics.get(self.train_key)
        step = trainer.global_step
        # A batch that only accumulates finishes no step.
        if not trainer.is_global_zero or loss is None or step == self._last_step:
            return
        self._last_step = step
        self._waiting.append((step, loss.detach().clone()))
        if len(self._waiting) >= _CHUNK:
            self._collect()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the validation loss, also of a validation before training."""
        loss = trainer.callback_metrics.get(self.val_key)
        if trainer.is_global_zero and loss is not None and not trainer.sanity_checking:
            self._val.append((trainer.global_step, float(loss)))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw; checkpoints are written by now."""
        self._draw(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw what there is of a run that failed or was interrupted; nothing is asked of a card that failed."""
        if trainer.state.fn != "fit":
            return
        lost = may_hang(exception)
        self._waiting = [(step, loss) for step, loss in self._waiting if loss.device.type == "cpu" or not lost]
        try:
            self._collect()
        except RuntimeError:
            # An error of the device that nobody has explained; it is on its way out, and must not be replaced.
            self._waiting = []
        self._draw(trainer)

    def _collect(self) -> None:
        """Move waiting losses to the host, all at once."""
        if self._waiting:
            values = torch.stack([loss for _, loss in self._waiting]).tolist()
            self._train += [(step, value) for (step, _), value in zip(self._waiting, values, strict=True)]
            self._waiting = []

    def _draw(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        self._collect()
        picture = _render(self._train, self._val)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(picture)
        except OSError as error:
            existing = next(parent for parent in self.path.absolute().parents if parent.exists())
            log.error(
                f"The loss curve {self.path} cannot be written: {error.strerror}. It needs {len(picture):,} bytes, "
                f"{shutil.disk_usage(existing).free:,} are free there. The training itself is not affected."
            )


def _render(train: list[tuple[int, float]], val: list[tuple[int, float]]) -> bytes:
    """The PNG's bytes. train, val: (optimizer step, loss)."""
    # Not pyplot: its windows and global state are none of a library's business.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss (nats per token)")
    for points, label, style in ((train, "training", {"linewidth": 1}), (val, "validation", {"marker": "o"})):
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    if train or val:
        axes.legend()
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
