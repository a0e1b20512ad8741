"""Lightning's training loops without the stall before every batch, and resuming where a checkpoint was really taken.

To learn of a SIGTERM, Lightning broadcasts a flag over all ranks before each batch and reads it on the host, which
drains an accelerator's queue. The launcher's signal watch ends all ranks by itself, so the flag has no reader here. And
a validation does not change the random numbers of training.

A resumed run begins with what the checkpoint says is left of its batch (resume.py). What callbacks do in hooks of that
batch that come after the save is lost all the same.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import Tensor
from typing_extensions import override

from lightning_npu_tp.checkpoint.rank_state import apply_rank_state, collect_rank_state
from lightning_npu_tp.trainer.resume import END, NOTHING, VALIDATION, Resume, savers


class TrainingEpochLoop(_TrainingEpochLoop):
    """Lightning's loop over the batches of an epoch; asks nobody for signals, and ends the batch of a checkpoint."""

    resume: Resume
    _batch_has_ended = True

    @override
    def _broadcast_sigterm_tensor(self) -> None:
        pass

    # --- what a checkpoint says ----------------------------------------------------------------

    @override
    def on_save_checkpoint(self) -> dict[str, Any]:
        """Lightning's state, what is left of this batch, and the metrics that callbacks and schedulers look at."""
        state: dict[str, Any] = super().on_save_checkpoint()
        if (left := self._left_now()) is not None:
            metrics = self.trainer.callback_metrics
            state["left"] = left
            state["deferred"] = [one._defer_save_until_validation for one in savers(self.trainer)]
            state["metrics"] = {name: value.detach().cpu().clone() for name, value in metrics.items()}
        return state

    def _left_now(self) -> str | None:
        current: Any = self.batch_progress.current
        if current.processed < current.ready:
            # Inside a step: it is made again.
            return None
        if self._batch_has_ended:
            return NOTHING
        if self.trainer.validating:
            # Its metrics are known and logged by then.
            return END if self.trainer.lightning_module._current_fx_name == "on_validation_end" else VALIDATION
        return VALIDATION if self._should_check_val_fx(self.trainer.fit_loop._data_fetcher) else END  # type: ignore[arg-type]

    @override
    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Take back what `on_save_checkpoint` gave; the progress of this loop has been loaded."""
        super().on_load_checkpoint(state_dict)
        self.resume.left = state_dict.get("left")
        if self.resume.left is None:
            return
        total: Any = self.batch_progress.total
        if total.completed < total.processed:
            # Lightning would end its epoch with it, too.
            self.batch_progress.increment_completed()
        device = self.trainer.strategy.root_device
        self.resume.deferred = state_dict["deferred"]
        metrics: dict[str, Tensor] = {name: value.to(device) for name, value in state_dict["metrics"].items()}
        self.trainer._logger_connector._callback_metrics.update(metrics)

    # --- a batch -------------------------------------------------------------------------------

    @property
    @override
    def _is_validation_done(self) -> bool:
        return super()._is_validation_done if self.resume.left is None else not self.resume.batch_is_open

    @override
    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        left = self.resume.left
        return super()._should_check_val_fx(data_fetcher) if left is None else left == VALIDATION

    @override
    def _should_accumulate(self) -> bool:
        # A step was made at that batch, also where this run has another window.
        return not self.resume.batch_is_open and super()._should_accumulate()

    @override
    def run(self, data_fetcher: Any) -> None:
        """Train on the batches of an epoch, or on those that are left of it."""
        if self.restarting and self.resume.left is not None and self.resume.inside is not None:
            # Making the loaders has drawn numbers.
            apply_rank_state(self.trainer, self.resume.inside)
        super().run(data_fetcher)

    @override
    def on_run_start(self, data_fetcher: Any) -> None:
        """Begin an epoch, unless it has no batch on some ranks."""
        super().on_run_start(data_fetcher)
        self.trainer.strategy.before_epoch()  # type: ignore[attr-defined]

    @override
    def advance(self, data_fetcher: Any) -> None:
        """Train on one batch, or only begin the end of the one at which the checkpoint was taken."""
        if self.resume.batch_is_open:
            # Lightning would go on in the middle of a validation, whose metrics are not in the checkpoint.
            self.val_loop.restarting = False
            return
        if self.resume.left is not None:
            self.restarting = False
            self.resume.left = None
        elif self.restarting and self._should_check_val_fx(data_fetcher):
            # A checkpoint of before: Lightning winds the validation loop on, whose loaders draw random numbers.
            self.resume.first = collect_rank_state(self.trainer)
        self._batch_has_ended = False
        super().advance(data_fetcher)

    @override
    def on_advance_end(self, data_fetcher: Any) -> None:
        """The end of a batch, with a validation where one is due; it leaves the generators of training as they are."""
        resumed, self._batch_has_ended = self.resume.batch_is_open, False
        validates = self._should_check_val_fx(data_fetcher)
        with self.resume.validation(self.trainer) if validates else nullcontext():
            super().on_advance_end(data_fetcher)
        if resumed:
            self.resume.left = None
            # From here on nothing tells the run from one that was never stopped: an epoch's end is a whole one.
            self.trainer.fit_loop._restarting = False
        self._batch_has_ended = True
        if not self._should_accumulate():
            self.trainer.strategy.after_step()  # type: ignore[attr-defined]


class FitLoop(_FitLoop):
    """Lightning's loop over epochs; ends the batch of the checkpoint even where no further step is to be made."""

    resume: Resume

    @override
    def on_run_start(self) -> None:
        """Before the first epoch: give each ModelCheckpoint back what it does not save."""
        super().on_run_start()
        self.resume.tell_savers(self.trainer)

    @property
    @override
    def done(self) -> bool:
        """Whether to leave the loop over epochs."""
        return not self.resume.batch_is_open and super().done

    @override
    def run(self) -> None:
        """Train the epochs that are left.

        Lightning counts an epoch that was cut short as done; so does a resumed run with no step left to make, whose
        validation would be logged as one of the epoch before otherwise.
        """
        super().run()
        epoch: Any = self.epoch_progress.current
        if epoch.processed < epoch.ready:
            self.epoch_progress.increment_processed()
            self.epoch_progress.increment_completed()

    @override
    def state_dict(self, destination: dict[str, Any] | None = None, prefix: str = "") -> dict[str, Any]:
        """Lightning's state, but an epoch that a limit of steps or a callback has cut short is still being trained.

        Lightning counts it as done; what is saved at its end, or when `fit` has returned, would go on with the next.
        """
        found: dict[str, Any] = super().state_dict(destination, prefix)
        current: Any = self.epoch_progress.current
        batches = self.epoch_loop.batch_progress.current.ready
        if current.ready == current.processed and batches and not self.epoch_loop._num_ready_batches_reached():
            for part in found[f"{prefix}epoch_progress"].values():
                part["processed"] = part["completed"] = part["ready"] - 1
        return found

    # mypy does not see the decorator of a property that has a setter.
    @property  # type: ignore[explicit-override]
    @override
    def restarting(self) -> bool:
        """Whether an epoch was begun before this process."""
        return self._restarting

    @restarting.setter
    @override
    def restarting(self, restarting: bool) -> None:
        _FitLoop.restarting.fset(self, restarting)  # type: ignore[attr-defined]
        # With max_steps Lightning would end an epoch that has ended once more, and count it twice; or, where the run
        # had ended with it, would find each later epoch at its end.
        epoch: Any = self.epoch_progress.current
        ended = epoch.ready == epoch.processed and epoch.completed in (epoch.processed - 1, epoch.processed)
        at_its_end = ended and self.epoch_loop.batch_progress.is_last_batch
        if at_its_end and self.resume.left == NOTHING:
            _Loop.restarting.fset(self, False)  # type: ignore[attr-defined]


def install_loops(trainer: Trainer, resume: Resume) -> None:
    """Put this file's loops in the place of the trainer's own, with all their state; a loop of a user's stays.

    resume: of the fit that begins.
    """
    stock: Any = trainer.fit_loop
    if type(stock.epoch_loop) is _TrainingEpochLoop:
        # Progress, results and the validation loop: a trainer may have run before.
        stock.epoch_loop = _with_state_of(stock.epoch_loop, TrainingEpochLoop(trainer))
    if type(stock) is _FitLoop:
        trainer.fit_loop = _with_state_of(stock, FitLoop(trainer))
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop):
        if isinstance(loop, FitLoop | TrainingEpochLoop):
            loop.resume = resume


def _with_state_of(stock: Any, own: Any) -> Any:
    own.__dict__.update(stock.__dict__)
    return own


def move_results_to_host(trainer: Trainer, *, lost: bool) -> None:
    """Move what a failed run has logged to the host, or forget it, before Lightning does and replaces the error.

    lost: the device is not to be asked.
    """
    loop = trainer._active_loop
    epochs = getattr(loop, "epoch_loop", loop)
    for each in (epochs, getattr(epochs, "val_loop", None)):
        results = getattr(each, "_results", None)
        if results is None:
            continue
        try:
            results.clear() if lost else results.cpu()
        except RuntimeError:
            results.clear()
    connector: Any = trainer._logger_connector
    for metrics in (connector._progress_bar_metrics, connector._logged_metrics, connector._callback_metrics):
        for name, value in list(metrics.items()):
            if not isinstance(value, Tensor) or value.device.type == "cpu":
                continue
            del metrics[name]
            with suppress(RuntimeError):
                if not lost:
                    metrics[name] = value.cpu()


def evaluate_without_inference_mode(trainer: Any) -> None:
    """Let validation, test and prediction run under no_grad only.

    FSDP keeps the tensors that it gathers into; made in inference mode, by a validation before the first step, they
    could not be trained. Lightning knows of this for its own FSDP strategy and for gloo.
    """
    for loop in (
        trainer.validate_loop,
        trainer.test_loop,
        trainer.predict_loop,
        trainer.fit_loop.epoch_loop.val_loop,
    ):
        loop.inference_mode = False
