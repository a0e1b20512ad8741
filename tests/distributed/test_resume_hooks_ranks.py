"""Going on from a checkpoint that was saved in any hook around the end of a batch, on two ranks.

Catches a validation, a scheduler's step, a row or an epoch's end that is left out because it came after the save, or
done again because it came before, and a validation whose random numbers training goes on with.
"""

from __future__ import annotations

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from test_strategy import config, trainer, whole
from torch import nn
from torch.utils.data import DataLoader
from transformers import DeepseekV2ForCausalLM

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.checkpoint.manifest import read_manifest

# Micro-batches in a window; windows in an epoch; windows between two validations; steps of a run.
WINDOW, PER_EPOCH, VALIDATE, STEPS = 2, 4, 2, 6


class Events(Logger):
    """What happened, in order: the module adds its own to the rows that are logged."""

    name = version = ""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.all.append(("row", step, *sorted(metrics.items())))


class Watched(LightningModule):
    """Draws random numbers in training and in validation, which also decides over the learning rate."""

    def __init__(self, events: Events, interval: str) -> None:
        super().__init__()
        with torch.device("meta"):
            self.network = DeepseekV2ForCausalLM(config(vocab_size=64))
        self.dropout, self.events, self.interval = nn.Dropout(0.3), events, interval

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.network(input_ids=batch, labels=batch).loss * self.dropout(torch.ones(1000)).mean()
        self.log("train", loss)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.events.all.append(("batch", batch_idx, self.trainer.current_epoch, self.global_step, loss.item(), rate))
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val", self.network(input_ids=batch, labels=batch).loss * torch.rand(()), sync_dist=True)

    def on_train_epoch_end(self) -> None:
        self.events.all.append(("epoch end", self.trainer.current_epoch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        # Every value of the validation that is no better than all before lowers the rate.
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.0)
        settings = {"scheduler": schedule, "monitor": "val", "interval": self.interval, "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def on_train_end(self) -> None:
        self.weights = whole(self)


class SaveInEveryHook(Checkpoint):
    """Saves around the ends of some steps, and notes how much had happened; Lightning calls it last, as it should."""

    def __init__(self, folder: str, steps: list[int], events: Events) -> None:
        self.folder, self.steps, self.events = folder, steps, events
        self.saved: dict[str, int] = {}

    def _save(self, trainer: Any, hook: str) -> None:
        path = f"{self.folder}/{hook}_{trainer.global_step}.ckpt"
        if trainer.fit_loop._should_accumulate() or trainer.global_step not in self.steps or path in self.saved:
            return
        self.saved[path] = len(self.events.all)
        trainer.save_checkpoint(path)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self._save(trainer, "batch end")

    def on_validation_start(self, trainer: Any, *args: Any) -> None:
        self._save(trainer, "validation start")

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        self._save(trainer, "validation batch end")

    def on_validation_end(self, trainer: Any, *args: Any) -> None:
        self._save(trainer, "validation end")

    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        # Of a run that has ended nothing is left.
        if trainer.global_step == PER_EPOCH:
            self._save(trainer, "epoch end")


def batches(rows: int, seed: int) -> DataLoader:
    data = torch.randint(0, 64, (rows, 6), generator=torch.Generator().manual_seed(seed))
    # Torch's own loader: it draws from everybody's generator whenever it begins.
    return DataLoader(data, batch_size=2)


class Positioned(DataLoader):
    """Goes on where it was: the least that Lightning takes for a loader with a position."""

    taken = start = 0

    def __iter__(self) -> Any:
        start, self.start, self.taken = self.start, 0, self.start
        for number, batch in enumerate(super().__iter__()):
            if number >= start:
                self.taken = number + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["taken"] % len(self)


def run(events: Events, bound: dict[str, Any], interval: str, path: str | None = None, saving: Any = None) -> Any:
    seed_everything(3, verbose=False)
    module = Watched(events, interval)
    fit = trainer(
        NPUTensorParallelStrategy(init_seed=0),
        **bound,
        accumulate_grad_batches=WINDOW,
        val_check_interval=VALIDATE * WINDOW,
        log_every_n_steps=1,
        logger=events,
        enable_checkpointing=saving is not None,
        callbacks=[EarlyStopping("val", patience=100), *([saving] if saving else [])],
    )
    rows = torch.randint(0, 64, (2 * WINDOW * PER_EPOCH, 6), generator=torch.Generator().manual_seed(0))
    fit.fit(module, Positioned(rows, batch_size=2), batches(4, 1), ckpt_path=path)
    return module.weights, (fit.global_step, fit.current_epoch, fit.early_stopping_callback.state_dict())


def in_every_hook(rank: int, world: int, folder: str, bound: dict[str, Any], steps: list[int], interval: str) -> Any:
    warnings.filterwarnings("ignore")
    straight = Events()
    saving = SaveInEveryHook(folder, steps, straight)
    weights, ends = run(straight, bound, interval, saving=saving)
    found = {}
    for path, before in saving.saved.items():
        events = Events()
        again, ends_again = run(events, bound, interval, path=path)
        same = all(torch.equal(again[name], value) for name, value in weights.items())
        found[Path(path).stem] = (straight.all[before:], events.all, same, ends, ends_again)
    return found


@pytest.mark.parametrize(
    "bound, steps, interval",
    # Without a validation, before and after one, at the end of an epoch, of a run.
    [({"max_steps": STEPS, "max_epochs": None}, [1, 2, 4, 6], "step"), ({"max_epochs": 2}, [4, 8], "epoch")],
    ids=["max_steps", "max_epochs"],
)
def test_nothing_is_left_out_and_nothing_done_twice(
    on_ranks: Any, tmp_path: Path, bound: Any, steps: Any, interval: str
) -> None:
    for found in on_ranks(in_every_hook, 2, str(tmp_path), bound, steps, interval, backend=None, timeout=500):
        hooks = {name.partition("_")[0] for name in found}
        assert hooks == {"batch end", "validation start", "validation batch end", "validation end", "epoch end"}
        for name, (wanted, events, same, ends, ends_again) in found.items():
            if name.startswith("batch end"):
                # The row of the step itself is logged after the save; lit_models/run/continued.py gives it back.
                assert wanted[0][2][0] == "epoch" and wanted[0][3][0] == "train", name
                wanted = wanted[1:]
            assert events == wanted, name
            assert same and ends_again == ends, name


class AsksWithin(Callback):
    """Asks for a checkpoint after the second of four micro-batches, and inside of one."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 4 == 1:
            trainer.save_checkpoint(f"{self.folder}/between_{trainer.global_step}.ckpt")

    def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
        trainer.save_checkpoint(f"{self.folder}/inside_{trainer.global_step}.ckpt")


def within_a_step(rank: int, world: int, folder: str) -> Any:
    warnings.filterwarnings("ignore")
    found: dict[str, Any] = {}

    def fit(name: str, steps: int, path: str | None = None, callbacks: Any = ()) -> list:
        seed_everything(3, verbose=False)
        events = Events()
        fit = trainer(
            NPUTensorParallelStrategy(init_seed=0),
            max_steps=steps,
            max_epochs=None,
            accumulate_grad_batches=4,
            # Between micro-batches, too.
            val_check_interval=6,
            logger=events,
            log_every_n_steps=1,
            enable_checkpointing=bool(callbacks),
            callbacks=list(callbacks),
        )
        module = Watched(events, "epoch")
        rows = torch.randint(0, 64, (32, 6), generator=torch.Generator().manual_seed(0))
        fit.fit(module, Positioned(rows, batch_size=2), batches(4, 1), ckpt_path=path)
        found[name] = module.weights
        return [event for event in events.all if event[0] == "batch"]

    def every(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(f"{folder}/{name}", "{step}", every_n_train_steps=1, save_top_k=-1)

    def files(name: str) -> list[str]:
        return sorted(path.name for path in Path(folder, name).iterdir())

    timed = ModelCheckpoint(f"{folder}/timed", "{step}", train_time_interval=timedelta(0), save_top_k=1, save_last=True)
    best = ModelCheckpoint(f"{folder}/best", "{step}", monitor="val", save_top_k=1, save_on_train_epoch_end=False)
    straight = fit("straight", 3, callbacks=[AsksWithin(folder), every("every"), timed, best])
    saved = {path.stem: read_manifest(path).step for path in Path(folder).glob("*.ckpt")}
    same = {}
    for name in ("between_0", "between_1", "inside_0"):
        again = fit(name, 3, f"{folder}/{name}.ckpt", [every(f"from_{name}")])
        equal = all(torch.equal(found[name][key], value) for key, value in found["straight"].items())
        same[name] = (again == straight[saved[name] * 4 :] and equal, files(f"from_{name}"))
    return saved, same, [files(name) for name in ("every", "timed", "best")]


def test_a_checkpoint_asked_for_within_a_step_is_saved_at_its_end(on_ranks: Any, tmp_path: Path) -> None:
    for saved, same, (every, timed, best) in on_ranks(within_a_step, 2, str(tmp_path), backend=None, timeout=400):
        # Named by who asked, at the step that was half made.
        assert saved == {f"{kind}_{step}": step + 1 for kind in ("between", "inside") for step in range(3)}
        assert every == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]
        # Older ones went, and only once the newer was there.
        assert len(timed) == 2 and len(best) == 1
        for name, (goes_on_alike, files) in same.items():
            assert goes_on_alike, name
            # None of the step that it went on from.
            assert files == every[saved[name] :], name
