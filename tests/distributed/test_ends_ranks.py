"""How data, epochs and runs end on several ranks.

Catches ranks that wait for ever for one whose data has ended, a `last.ckpt` older than the end of training or saved
twice, a run that finds no batch any more after its epoch's end, and a file of plain Lightning whose optimizer states
come to other parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from test_lightning_habits import Foreign, Run
from test_resume_hooks_ranks import PER_EPOCH, WINDOW, Events
from test_resume_hooks_ranks import run as run_with_events
from test_strategy import Module, data, trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.checkpoint.manifest import read_manifest
from lightning_npu_tp.errors import CheckpointError, ConfigError, DataError
from lightning_npu_tp.tools.testing.reference import float64_reference, relative_difference


class Stream(IterableDataset):
    """Rows that know no length: rank 0 has fewer."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.randint(0, 128, (self.rows, 6), generator=torch.Generator().manual_seed(1)))


class Several(Module):
    """Validates on more than one loader."""

    def validation_step(self, batch: torch.Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


def stream(batches: int) -> DataLoader:
    return DataLoader(Stream(2 * batches), batch_size=2)


def unequal(rank: int, world: int) -> dict[str, str]:
    warnings.filterwarnings("ignore")
    told: dict[str, str] = {}

    def of(name: str, function: str, *loaders: Any, how: str = "shard", **settings: Any) -> None:
        strategy = NPUTensorParallelStrategy(init_seed=0, data_parallel_size=2, data_parallel=how, timeout_s=30.0)
        run = trainer(strategy, use_distributed_sampler=False, **settings)
        try:
            getattr(run, function)(Several() if name == "loaders" else Module(), *loaders)
            told[name] = ""
        except DataError as error:
            told[name] = str(error)

    of("train", "fit", stream(2 + rank))
    of("nothing to train", "fit", stream(2 * rank))
    of("validation in fit", "fit", data(), stream(1 + rank))
    of("validate", "validate", stream(1 + rank))
    of("nothing to test", "test", stream(rank))
    of("predict", "predict", stream(1 + rank))
    of("loaders", "validate", [stream(1 + rank), stream(2 - rank)])
    of("sized", "validate", data(2 + 2 * rank))
    # What ends before, or whose ranks have nothing to do with each other, is no error.
    of("limited", "fit", stream(2 + rank), stream(1 + rank), limit_train_batches=2, limit_val_batches=1)
    of("equal", "fit", stream(2), stream(1))
    of("replicas", "validate", stream(1 + rank), how="replicate")
    return told


def test_ranks_whose_data_ends_at_different_times_are_told(on_ranks: Any) -> None:
    first, second = on_ranks(unequal, 2, backend=None, timeout=200)
    assert first == second
    for name, kind, batches in (
        ("train", "training", 2),
        ("nothing to train", "training", 0),
        ("validation in fit", "validation", 1),
        ("validate", "validation", 1),
        ("nothing to test", "test", 0),
        ("predict", "prediction", 1),
    ):
        assert first[name].startswith(f"The {kind} data ends after {batches} batches on rank 0 (data rank 0)"), name
        assert f"_batches={batches}." in first[name], name
    assert "data ends after 1 batches on rank 0" in first["loaders"]
    assert "different numbers of validation batches: 1 on rank 0" in first["sized"]
    assert [name for name, message in first.items() if not message] == ["limited", "equal", "replicas"]


class Saves(Callback):
    """Counts what is saved, by file and step."""

    def __init__(self) -> None:
        self.all: list[tuple[str, int]] = []

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        strategy, save = trainer.strategy, trainer.strategy.save_checkpoint

        def counted(checkpoint: Any, path: Any, *more: Any, **options: Any) -> None:
            self.all.append((Path(path).name, checkpoint["global_step"]))
            save(checkpoint, path, *more, **options)

        strategy.save_checkpoint = counted


class Stop(Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= 7


def ends(rank: int, world: int, folder: str) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    found: dict[str, Any] = {}

    def of(name: str, *callbacks: Any, strategy: Any = None, saver: Any = None, **bound: Any) -> None:
        saves = Saves()
        saver = {"every_n_train_steps": 5, "save_last": True, **(saver or {})}
        keep = ModelCheckpoint(f"{folder}/{name}", "{step}", **saver)
        settings = {"max_epochs": -1, "callbacks": [*callbacks, saves, keep], "enable_checkpointing": True, **bound}
        run = trainer(NPUTensorParallelStrategy(init_seed=0, **(strategy or {})), **settings)
        run.fit(Module(), data(), data(2))
        last = Path(folder, name, "last.ckpt")
        best = None if not keep.best_model_path else Path(keep.best_model_path).name
        step = read_manifest(last).step if last.exists() else None
        found[name] = (step, run.global_step, saves.all, best, last.is_symlink())

    of("max_steps", max_steps=7)
    of("max_epochs", max_epochs=2, limit_train_batches=3)
    of("should_stop", Stop())
    of("max_time", Timer(timedelta(milliseconds=1)), max_steps=100)
    of("early stopping", EarlyStopping("val_loss", stopping_threshold=100.0))
    of("at the last step", max_steps=5)
    of("link", max_steps=7, saver={"save_last": "link"})
    of("background", max_steps=7, strategy={"async_save": True})
    of("best", max_steps=7, saver={"monitor": "val_loss", "save_top_k": 1}, val_check_interval=1)
    of("not asked for", max_steps=7, saver={"save_last": None})
    return found


def test_the_last_checkpoint_is_of_the_last_step_and_saved_once(on_ranks: Any, tmp_path: Path) -> None:
    first, second = on_ranks(ends, 2, str(tmp_path), backend=None, timeout=300)
    assert first == second
    periodic = [("step=5.ckpt", 5), ("last.ckpt", 5)]
    for name in ("max_steps", "should_stop", "background"):
        assert first[name] == (7, 7, [*periodic, ("last.ckpt", 7)], "step=5.ckpt", False), name
    assert first["link"] == (7, 7, [periodic[0], ("last.ckpt", 7)], "step=5.ckpt", False)
    assert first["max_epochs"] == (6, 6, [*periodic, ("last.ckpt", 6)], "step=5.ckpt", False)
    for name in ("max_time", "early stopping"):
        step, last, saves, best, _ = first[name]
        assert step == last and saves == [("last.ckpt", last)] and best is None, name
    assert first["at the last step"] == (5, 5, periodic, "step=5.ckpt", False)
    # What is monitored decides over the best ones, the end of training over the last one.
    assert first["best"][:2] == (7, 7) and first["best"][2][-1] == ("last.ckpt", 7)
    assert ("step=7.ckpt", 7) not in first["best"][2] and first["best"][3] == "step=5.ckpt"
    assert first["not asked for"] == (None, 7, [periodic[0]], "step=5.ckpt", False)


def at_an_epochs_end(rank: int, world: int, folder: str) -> Any:
    warnings.filterwarnings("ignore")
    straight, found = Events(), []
    weights, ends = run_with_events(straight, {"max_steps": 3 * PER_EPOCH, "max_epochs": None}, "step")
    for number, epochs in enumerate((1, 2)):
        # The second goes on from the first one's end.
        events, path = Events(), f"{folder}/{number}.ckpt"
        saver = ModelCheckpoint(folder, str(number), every_n_train_steps=100, save_last=True)
        saver.CHECKPOINT_NAME_LAST = str(number)
        before = None if not number else f"{folder}/{number - 1}.ckpt"
        run_with_events(events, {"max_steps": epochs * PER_EPOCH, "max_epochs": None}, "step", before, saver)
        again = Events()
        then, ends_again = run_with_events(again, {"max_steps": 3 * PER_EPOCH, "max_epochs": None}, "step", path)
        begin = next(
            place
            for place, event in enumerate(straight.all)
            if event[0] == "batch" and event[2] == epochs and event[1] == 0
        )
        same = all(torch.equal(then[name], value) for name, value in weights.items())
        found.append((again.all, straight.all[begin:], same, ends, ends_again))
    return found


def test_a_run_that_ended_with_its_epoch_goes_on_with_the_next(on_ranks: Any, tmp_path: Path) -> None:
    assert WINDOW * PER_EPOCH > 1
    for rank in on_ranks(at_an_epochs_end, 2, str(tmp_path), backend=None, timeout=300):
        for again, wanted, same, ends, ends_again in rank:
            assert again == wanted and same and ends_again == ends


class OtherOrder(Foreign):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([*self.head.parameters(), *self.backbone.parameters()][::-1], lr=self.lr)


def from_plain_lightning(rank: int, world: int, folder: str, layout: Any) -> Any:
    warnings.filterwarnings("ignore")
    seed_everything(3, verbose=False)
    run = Run(rank, world, layout, folder)
    if layout is None:
        with float64_reference():
            first, module = run.trainer(max_epochs=1), Foreign()
            run.fit(Foreign(), first)
            first.save_checkpoint(f"{folder}/plain.ckpt")
            run.fit(module, run.trainer(max_epochs=3), ckpt_path=f"{folder}/plain.ckpt")
        return module.weights
    module = Foreign()
    run.fit(module, run.trainer(max_epochs=3), ckpt_path=f"{folder}/plain.ckpt")
    with pytest.raises(CheckpointError, match=r"say the numbers of their parameters.*another order.*resume_weights"):
        run.fit(OtherOrder(), run.trainer(max_epochs=3), ckpt_path=f"{folder}/plain.ckpt")
    return module.weights


@pytest.mark.parametrize("layout", [{}, {"data_parallel_size": 2, "expert_parallel_size": 2}], ids=["tensor", "data"])
def test_a_file_of_plain_lightning_goes_on_here(on_ranks: Any, tmp_path: Path, layout: Any) -> None:
    (weights,) = on_ranks(from_plain_lightning, 1, str(tmp_path), None, backend=None, timeout=120)
    for found in on_ranks(from_plain_lightning, 2, str(tmp_path), layout, backend=None, timeout=120):
        for name, value in weights.items():
            assert relative_difference(found[name], value) < 1e-10, name


def pruning(rank: int, world: int) -> str:
    from lightning.pytorch.callbacks import ModelPruning

    run: Trainer = trainer(callbacks=[ModelPruning("l1_unstructured", amount=0.5)])
    with pytest.raises(ConfigError) as refused:
        run.fit(Module(), data())
    return str(refused.value)


def test_pruning_is_refused_by_name(on_ranks: Any) -> None:
    for told in on_ranks(pruning, 2, backend=None):
        assert told.startswith("ModelPruning replaces each weight") and "exported" in told
