"""`ContinueRun`: a run folder that is gone on with has one metrics.csv and one loss curve, as if never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from lightning_npu_tp.callbacks import LossCurve
from lit_models.run.loggers import CSVMetrics, TensorBoard, read_rows

ROW = "row_of_this_step"


class ContinueRun(Callback):
    """When a run goes on in its folder, cuts what was logged after the step of its checkpoint.

    A step is logged after its checkpoint was saved; so the checkpoint carries the row, which a kill between the two
    would lose for good. The loss curve begins with what is left of train/loss and val/loss in metrics.csv.

    continues: whether the folder may hold an earlier part of this run; otherwise only the rows are saved.
    """

    def __init__(self, *, continues: bool = True) -> None:
        self._continues = continues
        self._begun = False

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds `ROW`: the metrics that are about to be logged for the step that was just made, if any are."""
        connector, step = trainer._logger_connector, trainer.fit_loop.epoch_loop._batches_that_stepped
        # The two counts agree again once the step has been logged.
        if trainer.training and connector.should_update_logs and step < trainer.global_step:
            row = convert_tensors_to_scalars(connector.metrics["log"])
            checkpoint[ROW] = {"step": step, "epoch": trainer.current_epoch, **row}

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Cut what was logged after the checkpoint's step; also for a run that has nothing left to do."""
        row = checkpoint.pop(ROW, None)
        if not self._continues:
            return
        loops = checkpoint.get("loops", {}).get("fit_loop")
        step = 0 if loops is None else checkpoint["global_step"]
        self._begun = True
        if trainer.state.fn != TrainerFn.FITTING:
            # A validation before the fit is logged at this step, and cut when the fit begins.
            trainer.fit_loop.epoch_loop._batches_that_stepped = step
            return
        validates = loops is not None and loops["epoch_loop.state_dict"].get("left") == "validation"
        self._cut(trainer, step, row, validates=validates)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first row of a run that had no checkpoint yet: what an earlier start logged goes."""
        if self._continues and not self._begun:
            self._begun = True
            self._cut(trainer, 0, None, validates=False)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where nothing was validated before the first step: what an earlier start logged goes here."""
        self.on_validation_start(trainer, pl_module)

    @rank_zero_only
    def _cut(self, trainer: Trainer, step: int, row: dict[str, Any] | None, *, validates: bool) -> None:
        curves = [callback for callback in trainer.callbacks if isinstance(callback, LossCurve)]  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            if isinstance(logger, CSVMetrics | TensorBoard):
                logger.go_on(step, row)
            if isinstance(logger, CSVMetrics):
                for curve in curves:
                    train, val = (points(logger.path, key) for key in (curve.train_key, curve.val_key))
                    # That validation is made again, and the curve notes it then.
                    curve.begin_with(train, [point for point in val if not (validates and point[0] == step)])


def points(path: Path, key: str) -> list[tuple[int, float]]:
    """(optimizer steps done, value) of every row of a metrics.csv that has the metric."""
    _, rows, _ = read_rows(path)
    # A row's step is the number of steps before the one that logged it.
    return [(int(row["step"]) + 1, float(row[key])) for row in rows if row.get(key) and row["step"]]
