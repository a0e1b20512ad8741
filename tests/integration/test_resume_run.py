"""`resume=auto`: a run folder that is gone on with.

Catches a resumed run that trains otherwise, rows that stand twice in metrics.csv, a run that is overwritten, a kill
that costs more than what was trained since the last checkpoint, ranks that stop after different steps.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from benchmarks.kill_rounds import SMALL, life, tensors
from lightning_npu_tp.callbacks import LossCurve
from lightning_npu_tp.checkpoint.manifest import read_manifest, verify
from lightning_npu_tp.errors import ConfigError
from lit_models.continued import ContinueRun, points
from lit_models.loggers import CSVMetrics
from lit_models.run_folder import changes, claim, goes_on

ROOT = Path(__file__).parents[2]


def train(folder: Path, *settings: str, code: int = 0) -> str:
    command = [sys.executable, "train.py", f"hydra.run.dir={folder}", *SMALL, *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_a_run_that_is_killed_and_gone_on_with_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    told = train(straight, "trainer.max_steps=24")
    assert "No complete checkpoint yet: starting anew." in told
    rng, lives = random.Random(1), []
    while len(lives) < 2:
        lives.append(life(killed, 24, [], rng, 11.0))
        assert not lives[-1]["left"]
    told = train(killed, "trainer.max_steps=24", "strategy.async_save=true")
    if any(path.suffix == ".ckpt" for path in (killed / "checkpoints").iterdir()):
        assert "strategy.async_save: False -> True" in told
    wanted, found = tensors(straight), tensors(killed)
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    for key in ("train/loss", "val/loss"):
        rows = points(straight / "metrics.csv", key)
        assert len(rows) >= 3 and points(killed / "metrics.csv", key) == rows
    # The config of the first start stays.
    assert yaml.safe_load((killed / "config.yaml").read_text())["strategy"]["async_save"] is False
    # A finished run has nothing left to do, and says from where.
    assert "Going on from" in train(killed, "trainer.max_steps=24")
    assert points(killed / "metrics.csv", "train/loss") == points(straight / "metrics.csv", "train/loss")


def test_a_run_is_not_overwritten_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1\n")
    told = train(tmp_path, "resume=null", code=2)
    assert "a run is never overwritten" in told and "resume=auto" in told
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"


def test_settings_of_resume() -> None:
    assert goes_on(OmegaConf.create({"resume": "auto", "ckpt_path": None}))
    assert not goes_on(OmegaConf.create({"resume": None})) and not goes_on(OmegaConf.create({}))
    with pytest.raises(ConfigError, match="resume='yes' does not exist"):
        goes_on(OmegaConf.create({"resume": "yes"}))
    with pytest.raises(ConfigError, match="ckpt_path=x names another"):
        goes_on(OmegaConf.create({"resume": "auto", "ckpt_path": "x"}))


def test_what_changed_since_the_first_start_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = OmegaConf.create({"resume": "auto", "a": {"b": 1, "c": [1, 2]}, "run_dir": "x", "gone": None})
    claim(tmp_path, first)
    now = OmegaConf.create({"resume": "auto", "a": {"b": 2, "c": [1, 2]}, "run_dir": "y", "new": {}})
    assert changes(first, now) == ["a.b: 1 -> 2", "new: absent -> {}"]
    claim(tmp_path, now)
    assert "a.b: 1 -> 2" in capsys.readouterr().out
    assert OmegaConf.load(tmp_path / "config.yaml").a.b == 1
    with pytest.raises(ConfigError, match="already holds a run"):
        claim(tmp_path, OmegaConf.create({"resume": None}))


def test_rows_after_the_resumed_step_are_cut(tmp_path: Path) -> None:
    logger = CSVMetrics(tmp_path / "metrics.csv")
    logger.cut(3)
    for step in range(5):
        logger.log_metrics({"train/loss": step / 10}, step=step)
    logger.log_metrics({"val/loss": 0.5}, step=2)
    logger.cut(3)
    assert points(logger.path, "train/loss") == [(1, 0.0), (2, 0.1), (3, 0.2)]
    assert points(logger.path, "val/loss") == [(3, 0.5)] and points(tmp_path / "absent", "x") == []
    logger.log_metrics({"train/loss": 7.0}, step=3)
    logger.save()
    assert points(logger.path, "train/loss")[-1] == (4, 7.0)


def test_a_row_that_a_kill_took_comes_back_from_the_checkpoint(tmp_path: Path) -> None:
    """A step's row is written after its checkpoint: what a kill between the two loses must come back."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    one = ["trainer.devices=1"]
    train(straight, "trainer.max_steps=10", *one)
    train(killed, "trainer.max_steps=8", *one)
    metrics = killed / "metrics.csv"
    lines = metrics.read_text().splitlines(keepends=True)
    step = lines[0].split(",").index("step")
    metrics.write_text("".join(line for line in lines if line.split(",")[step] != "7"))
    assert points(metrics, "train/loss")[-1][0] == 7
    train(killed, "trainer.max_steps=10", *one)
    for key in ("train/loss", "val/loss"):
        assert points(metrics, key) == points(straight / "metrics.csv", key)


def test_a_row_that_is_there_is_not_added_again(tmp_path: Path) -> None:
    logger = CSVMetrics(tmp_path / "metrics.csv")
    logger.add_missing({"step": 0, "epoch": 0, "train/loss": 0.5})
    logger.add_missing({"step": 0, "epoch": 0, "train/loss": 0.5})
    logger.log_metrics({"val/loss": 2.0, "epoch": 0}, step=1)
    logger.add_missing({"step": 1, "epoch": 0, "train/loss": 0.25})
    assert points(logger.path, "train/loss") == [(1, 0.5), (2, 0.25)]


def test_the_loss_curve_begins_with_what_was_logged(tmp_path: Path) -> None:
    logger, curve = CSVMetrics(tmp_path / "metrics.csv"), LossCurve(tmp_path / "loss.png")
    for step in range(5):
        logger.log_metrics({"train/loss": step / 10}, step=step)
    logger.log_metrics({"val/loss": 0.5}, step=2)
    trainer = SimpleNamespace(loggers=[logger], callbacks=[curve], global_step=3)
    ContinueRun().on_train_start(trainer, None)
    assert (curve._train, curve._val) == ([(1, 0.0), (2, 0.1), (3, 0.2)], [(3, 0.5)])


@pytest.mark.parametrize("whom", ["parent", "child"])
def test_a_preempted_run_saves_and_goes_on(tmp_path: Path, whom: str) -> None:
    """SIGTERM to one process, in the middle of training: all ranks stop after the same step."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    long = ["trainer.max_steps=40", "callbacks.checkpoint.every_n_train_steps=1000"]
    train(straight, *long)
    with open(tmp_path / "told", "w+") as told:
        run = subprocess.Popen(
            [
                sys.executable,
                "train.py",
                f"hydra.run.dir={stopped}",
                *SMALL,
                *long,
                "logger.csv.flush_every_n_rows=1",
                "export=true",
            ],
            cwd=ROOT,
            stdout=told,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + 90
        while len(points(stopped / "metrics.csv", "train/loss")) < 5 and time.monotonic() < deadline:
            time.sleep(0.05)
        family = psutil.Process(run.pid).children(recursive=True)
        (run if whom == "parent" else family[0]).send_signal(signal.SIGTERM)
        assert run.wait(60) == 143
        assert not psutil.wait_procs(family, timeout=30)[1]
        told.seek(0)
        text = told.read()
    assert "Asked to end by SIGTERM after step" in text and "Traceback" not in text, text
    saved = read_manifest(stopped / "checkpoints/preempted.ckpt")
    assert 5 <= saved.step < 40 and not verify(stopped / "checkpoints/preempted.ckpt")
    assert not (stopped / "export").exists()
    told_again = train(stopped, *long)
    assert "checkpoints/preempted.ckpt" in told_again
    wanted, found = tensors(straight), tensors(stopped)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    for key in ("train/loss", "val/loss"):
        assert points(stopped / "metrics.csv", key) == points(straight / "metrics.csv", key)
