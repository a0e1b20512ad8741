"""Catches: a default job that no longer runs from the command line, a run folder that lacks a file or is written over,
settings that change when the number of devices does, errors that bury the sentence that matters in a traceback.

Each test runs `python train.py` as a user does, with few steps.
"""

from __future__ import annotations

import csv
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.types import RunMode

import lightning_npu_tp
from lightning_npu_tp import ConfigError, RankFailure

ROOT = Path(__file__).parents[2]
# Small enough for seconds; the model, its sharding and the data are the default job's.
FEW_STEPS = [
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.limit_val_batches=2",
    "scheduler.warmup_steps=1",
    "data.batch_size=2",
    "data.sequence_length=64",
    "data.max_tokens=50_000",
    "data.max_val_tokens=2_000",
]


def train(cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Where CI is set transformers hands its warnings to the root logger, which Hydra prints: not what a user sees.
    inherited = {name: value for name, value in os.environ.items() if name != "CI"}
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


def metrics(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One short run on one device, warm-up included."""
    place = tmp_path_factory.mktemp("default")
    done = train(place, *FEW_STEPS, "warmup=compile", "warmup.max_length=16")
    assert done.returncode == 0, done.stderr
    (folder,) = (place / "runs").iterdir()
    return folder, done


def test_the_run_folder_holds_everything_the_run_promises(finished) -> None:
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.yaml", "metrics.csv", "tensorboard", "checkpoints", "loss.png"}
    assert "${" not in (folder / "config.yaml").read_text()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "checkpoints" / "last.ckpt").exists()
    assert any(path.name.startswith("events.") for path in (folder / "tensorboard").iterdir())
    assert len(metrics(folder, "train/loss")) == 4
    assert len(metrics(folder, "train/tokens_per_second")) == 3
    # Before training, twice within, after.
    assert len(metrics(folder, "val/loss")) == 4


def test_the_run_tells_what_it_does_and_ends_with_the_figures(finished) -> None:
    folder, done = finished
    assert "warm-up: " in done.stdout + done.stderr
    assert "step 4/4: loss " in done.stdout and "validation loss" in done.stdout
    tail = done.stdout[done.stdout.index("validation before training:") :]
    before, after = (float(number) for number in re.findall(r"loss ([\d.]+) nats per token, perplexity", tail))
    assert before == pytest.approx(metrics(folder, "val/loss")[0], abs=1e-4)
    assert after == pytest.approx(metrics(folder, "val/loss")[-1], abs=1e-4)
    assert after < before
    assert f"run folder: {folder}" in tail
    assert all(name in tail for name in ("config.yaml", "metrics.csv", "loss.png", "checkpoints", "tensorboard"))


def test_an_existing_run_folder_is_never_overwritten(finished) -> None:
    folder, _ = finished
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = train(folder.parent, *FEW_STEPS, "seed=1", f"hydra.run.dir={folder}")
    assert again.returncode == 2
    assert again.stderr.startswith(f"error: The run folder {folder} already holds a run")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("devices", [2, 4])
def test_more_devices_train_the_same_model_in_one_folder(finished, tmp_path, devices: int) -> None:
    folder, _ = finished
    done = train(tmp_path, *FEW_STEPS, f"trainer.devices={devices}", "hydra.run.dir=more", "validate_before=false")
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["more"]
    assert metrics(tmp_path / "more", "train/loss") == pytest.approx(metrics(folder, "train/loss"), rel=1e-4)
    assert done.stdout.count("run folder:") == 1


def test_a_run_resumes_from_its_checkpoint(finished, tmp_path) -> None:
    folder, _ = finished
    checkpoint = folder / "checkpoints" / "last.ckpt"
    done = train(tmp_path, *FEW_STEPS, "trainer.max_steps=6", f"ckpt_path={checkpoint}", "hydra.run.dir=more")
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "more", "train/loss")) == 2
    # The validation before is that of the checkpoint.
    assert metrics(tmp_path / "more", "val/loss")[0] == pytest.approx(metrics(folder, "val/loss")[-1], rel=1e-5)


def test_a_sweep_gives_every_job_a_folder_and_goes_on_after_a_failure(tmp_path) -> None:
    done = train(tmp_path, "-m", *FEW_STEPS, "validate_before=false", "data.batch_size=0,2", "hydra.sweep.dir=sweep")
    assert done.returncode != 0
    assert "data.batch_size=0 is too small" in done.stderr
    assert len(metrics(tmp_path / "sweep" / "1", "train/loss")) == 4
    assert not (tmp_path / "sweep" / "0" / "metrics.csv").exists()


def test_the_card_experiment_says_in_one_sentence_what_is_missing(tmp_path) -> None:
    done = train(tmp_path, "experiment=deepseek_v2_lite_4npu")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "npu" in line and "`python train.py` alone" in line
    # Before anything was built or claimed.
    assert not list(tmp_path.rglob("metrics.csv")) and "data: " not in done.stdout


def test_a_wrong_setting_is_one_line_unless_the_traceback_is_asked_for(tmp_path) -> None:
    wrong = [*FEW_STEPS, "model.config.vocab_size=200"]
    done = train(tmp_path, *wrong)
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: The tokenizer")
    full = train(tmp_path, *wrong, HYDRA_FULL_ERROR="1")
    assert full.returncode == 1 and "Traceback" in full.stderr and "DataError" in full.stderr


@pytest.mark.parametrize(("error", "code"), [(RankFailure("Rank 1 failed first"), 1), (ConfigError("a setting"), 2)])
def test_a_failed_rank_ends_with_1_and_is_told_once_a_setting_with_2(monkeypatch, capsys, error, code) -> None:
    script = runpy.run_path(str(ROOT / "train.py"))

    def fail(*_) -> None:
        raise error

    monkeypatch.setattr(lightning_npu_tp, "run_job", fail, raising=False)
    job = SimpleNamespace(mode=RunMode.RUN)
    monkeypatch.setitem(script["run"].__wrapped__.__globals__, "HydraConfig", SimpleNamespace(get=lambda: job))
    with pytest.raises(SystemExit) as ended:
        script["run"].__wrapped__(None)
    assert ended.value.code == code and ("error: " in capsys.readouterr().err) is (code == 2)
