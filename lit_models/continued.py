"""`ContinueRun`: a run folder that is gone on with has one metrics.csv and one loss curve, as if never stopped."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_npu_tp.callbacks import LossCurve
from lit_models.loggers import CSVMetrics

ROW = "row_of_this_step"


class ContinueRun(Callback):
    """At the beginning of training, cuts what was logged after the step that the run goes on from.

    The loss curve begins with what is left of train/loss and val/loss in metrics.csv. A step is logged after its
    checkpoint was saved; so the checkpoint carries the row, which a kill between the two would lose for good.
    """

    def __init__(self) -> None:
        self._row: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds `ROW`: the metrics that are about to be logged for the step that was just made, if any are."""
        connector, step = trainer._logger_connector, trainer.fit_loop.epoch_loop._batches_that_stepped
        # The two counts agree again once the step has been logged.
        if trainer.training and connector.should_update_logs and step < trainer.global_step:
            row = convert_tensors_to_scalars(connector.metrics["log"])
            checkpoint[ROW] = {"step": step, "epoch": trainer.current_epoch, **row}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes the row out again."""
        self._row = checkpoint.pop(ROW, None)

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The step is known now."""
        curves = [callback for callback in trainer.callbacks if isinstance(callback, LossCurve)]  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            if isinstance(logger, CSVMetrics):
                logger.cut(trainer.global_step)
                if self._row is not None:
                    logger.add_missing(self._row)
                for curve in curves:
                    curve.begin_with(*(points(logger.path, key) for key in (curve.train_key, curve.val_key)))


def points(path: Path, key: str) -> list[tuple[int, float]]:
    """(optimizer steps done, value) of every row of a metrics.csv that has the metric."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        # A row's step is the number of steps before the one that logged it.
        return [(int(row["step"]) + 1, float(row[key])) for row in csv.DictReader(file) if row.get(key)]
