"""Lightning's own callbacks, profilers and options under the strategy on two ranks.

Catches a hook of Lightning's that copies, averages, saves or times the module in a way that shards do not survive.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.loggers import CSVLogger
from test_strategy import WORLD, Module, data, trainer


def many_callbacks(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    checkpoint = callbacks.ModelCheckpoint(
        dirpath=f"{folder}/checkpoints", monitor="val_loss", save_top_k=1, save_last=True, every_n_epochs=1
    )
    run = trainer(
        max_epochs=3,
        callbacks=[
            checkpoint,
            callbacks.EarlyStopping("val_loss", patience=10),
            callbacks.LearningRateMonitor(),
            callbacks.RichProgressBar(),
            callbacks.RichModelSummary(),
            callbacks.GradientAccumulationScheduler({1: 2}),
            callbacks.Timer("00:01:00:00"),
            callbacks.DeviceStatsMonitor(),
            callbacks.OnExceptionCheckpoint(folder),
            callbacks.ThroughputMonitor(batch_size_fn=len, window_size=2),
        ],
        logger=CSVLogger(folder, name="csv", version=0),
        enable_checkpointing=True,
        enable_progress_bar=True,
        enable_model_summary=True,
        log_every_n_steps=2,
        profiler="simple",
    )
    module = Module()
    run.fit(module, data(), data())
    result = {
        "epochs": run.current_epoch,
        "steps": run.global_step,
        "best": checkpoint.best_model_path,
        "losses": module.losses,
        "best score": float(checkpoint.best_model_score),
    }
    result["test"] = run.test(module, data(), ckpt_path="best", verbose=False)[0]["val_loss"]
    result["last"] = run.validate(module, data(), ckpt_path="last", verbose=False)[0]["val_loss"]
    result["predictions"] = len(run.predict(module, data(), ckpt_path="last"))
    return result


def test_the_usual_callbacks_work_together(on_ranks: Any, tmp_path: Path) -> None:
    first, second = on_ranks(many_callbacks, WORLD, str(tmp_path), backend=None, timeout=120)
    assert first == second
    assert first["epochs"] == 3 and first["steps"] == 4 + 2 + 2
    assert first["losses"][-1] < first["losses"][0]
    assert first["test"] == pytest.approx(first["best score"], rel=1e-6)
    assert first["predictions"] == 4
    assert Path(first["best"]).is_dir() and (tmp_path / "checkpoints/last.ckpt").is_dir()
    assert "lr-AdamW" in (tmp_path / "csv/version_0/metrics.csv").read_text().splitlines()[0]


def averaging(rank: int, world_size: int) -> dict[str, Any]:
    result = {}
    for name, callback in {
        "swa": callbacks.StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1),
        "ema": callbacks.EMAWeightAveraging(decay=0.5),
    }.items():
        module = Module()
        run = trainer(max_epochs=3, callbacks=[callback])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.fit(module, data(), data())
        result[name] = run.validate(module, data(), verbose=False)[0]["val_loss"]
        result[f"{name} losses"] = module.losses
        plain = Module()
        other = trainer(max_epochs=3)
        other.fit(plain, data())
        result[f"{name} plain"] = other.validate(plain, data(), verbose=False)[0]["val_loss"]
    return result


def test_weight_averaging_works(on_ranks: Any) -> None:
    first, second = on_ranks(averaging, WORLD, backend=None, timeout=120)
    assert first == second
    for name in ("swa", "ema"):
        assert first[name] < first[f"{name} losses"][0]
        assert first[name] != first[f"{name} plain"], "the weights are those of the last step, not an average"


def options(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, arguments in {
        "overfit": {"overfit_batches": 1, "max_epochs": 3},
        "fast_dev_run": {"fast_dev_run": True},
        "advanced": {"profiler": "advanced"},
        "pytorch": {"profiler": "pytorch", "default_root_dir": folder},
        "accumulate": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    }.items():
        module = Module()
        run = trainer(**arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.fit(module, data(), data())
        result[name] = (run.global_step, module.losses[-1])
    return result


def test_trainer_options_work(on_ranks: Any, tmp_path: Path) -> None:
    first, second = on_ranks(options, WORLD, str(tmp_path), backend=None, timeout=120)
    assert first == second
    assert {name: steps for name, (steps, _) in first.items()} == {
        "overfit": 3,
        "fast_dev_run": 1,
        "advanced": 4,
        "pytorch": 4,
        "accumulate": 2,
    }


def failing(rank: int, world_size: int, folder: str) -> bool:
    module = Module()

    def fail() -> None:
        raise RuntimeError("on purpose")

    module.on_train_epoch_end = fail
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer(callbacks=[callbacks.OnExceptionCheckpoint(folder)], enable_checkpointing=True).fit(module, data())
    return torch.distributed.is_initialized()


def test_a_checkpoint_is_written_when_all_ranks_fail(on_ranks: Any, tmp_path: Path) -> None:
    assert on_ranks(failing, WORLD, str(tmp_path), backend=None) == [False, False]
    assert (tmp_path / "on_exception.ckpt/meta.pt").is_file()
