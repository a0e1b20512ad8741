"""`ContinueRun`: a run folder that is gone on with has one metrics.csv and one loss curve, as if never stopped."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_npu_tp.callbacks import LossCurve
from lit_models.loggers import CSVMetrics


class ContinueRun(Callback):
    """At the beginning of training, cuts what was logged after the step that the run goes on from.

    The loss curve begins with what is left of train/loss and val/loss in metrics.csv.
    """

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The step is known now."""
        curves = [callback for callback in trainer.callbacks if isinstance(callback, LossCurve)]  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            if isinstance(logger, CSVMetrics):
                logger.cut(trainer.global_step)
                for curve in curves:
                    curve.begin_with(*(points(logger.path, key) for key in (curve.train_key, curve.val_key)))


def points(path: Path, key: str) -> list[tuple[int, float]]:
    """(optimizer steps done, value) of every row of a metrics.csv that has the metric."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        # A row's step is the number of steps before the one that logged it.
        return [(int(row["step"]) + 1, float(row[key])) for row in csv.DictReader(file) if row.get(key)]
