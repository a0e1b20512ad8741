"""`resume=auto`: a run folder that is gone on with.

Catches a resumed run that trains otherwise, rows that stand twice in metrics.csv, a run that is overwritten, a kill
that costs more than what was trained since the last checkpoint, ranks that stop after different steps.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from benchmarks.kill_rounds import SMALL, life, repeated_rows, tensors
from lightning_npu_tp.callbacks import LossCurve
from lightning_npu_tp.checkpoint.manifest import read_manifest, verify
from lightning_npu_tp.errors import ConfigError
from lit_models.run.continued import ROW, ContinueRun, points
from lit_models.run.loggers import CSVMetrics, tensorboard
from lit_models.run.run_folder import changes, claim, goes_on

ROOT = Path(__file__).parents[2]


def train(folder: Path, *settings: str, code: int = 0) -> str:
    command = [sys.executable, "train.py", f"hydra.run.dir={folder}", *SMALL, *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_a_run_that_is_killed_and_gone_on_with_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    begin = time.monotonic()
    told = train(straight, "trainer.max_steps=24")
    # On a busy machine a life of fixed length would end before training begins.
    longest = time.monotonic() - begin
    assert "No complete checkpoint yet: starting anew." in told
    rng, lives = random.Random(1), []
    while len(lives) < 2:
        lives.append(life(killed, 24, [], rng, longest))
        assert not lives[-1]["left"]
    claimed = (killed / "config.yaml").exists()
    told = train(killed, "trainer.max_steps=24", "strategy.async_save=true")
    assert ("strategy.async_save: False -> True" in told) == claimed
    wanted, found = tensors(straight), tensors(killed)
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    for key in ("train/loss", "val/loss"):
        rows = points(straight / "metrics.csv", key)
        assert len(rows) >= 3 and points(killed / "metrics.csv", key) == rows
    # The config of the first start stays.
    assert yaml.safe_load((killed / "config.yaml").read_text())["strategy"]["async_save"] is not claimed
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


def test_rows_that_a_kill_took_come_back(tmp_path: Path) -> None:
    """A step's row, and the validation that is due after it, come after its checkpoint: a kill between loses both."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    one = ["trainer.devices=1", "trainer.val_check_interval=4"]
    train(straight, "trainer.max_steps=10", *one)
    train(killed, "trainer.max_steps=8", *one)
    metrics = killed / "metrics.csv"
    whole = metrics.read_text()
    lines = whole.splitlines(keepends=True)
    step = lines[0].split(",").index("step")
    # The row of the validation at the end of train.py is the one of step 8.
    metrics.write_text("".join(line for line in lines if line.split(",")[step] not in "78"))
    assert points(metrics, "train/loss")[-1][0] == 7 and points(metrics, "val/loss")[-1][0] == 4
    shutil.copytree(killed, tmp_path / "longer")
    train(killed, "trainer.max_steps=8", *one)
    assert metrics.read_text() == whole
    # With nothing lost nothing is added.
    train(killed, "trainer.max_steps=8", *one)
    assert metrics.read_text() == whole
    metrics = tmp_path / "longer/metrics.csv"
    train(tmp_path / "longer", "trainer.max_steps=10", *one)
    for key in ("train/loss", "val/loss"):
        assert points(metrics, key) == points(straight / "metrics.csv", key)
    assert not repeated_rows(metrics)


@pytest.mark.parametrize("logged, row", [(2, {"step": 2, "epoch": 1, "train/loss": 0.5}), (3, None)])
def test_a_checkpoint_carries_the_row_of_its_step_until_that_is_logged(logged: int, row: dict | None) -> None:
    trainer = SimpleNamespace(
        training=True,
        global_step=3,
        current_epoch=1,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=logged)),
        _logger_connector=SimpleNamespace(should_update_logs=True, metrics={"log": {"train/loss": torch.tensor(0.5)}}),
    )
    checkpoint: dict = {}
    ContinueRun().on_save_checkpoint(trainer, None, checkpoint)
    assert checkpoint.get(ROW) == row


def test_a_row_that_is_there_is_not_added_again(tmp_path: Path) -> None:
    logger = CSVMetrics(tmp_path / "metrics.csv")
    logger.add_missing({"step": 0, "epoch": 0, "train/loss": 0.5})
    logger.add_missing({"step": 0, "epoch": 0, "train/loss": 0.5})
    logger.log_metrics({"val/loss": 2.0, "epoch": 0}, step=1)
    logger.add_missing({"step": 1, "epoch": 0, "train/loss": 0.25})
    assert points(logger.path, "train/loss") == [(1, 0.5), (2, 0.25)]


def going_on(loggers: list, *, left: str | None = None, step: int = 3, fn: str = "fit") -> tuple[Any, dict]:
    """What `ContinueRun` sees of a trainer, and the checkpoint that it loads."""
    curve = LossCurve(Path("loss.png"))
    trainer = SimpleNamespace(
        loggers=loggers,
        callbacks=[curve],
        state=SimpleNamespace(fn=fn),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0)),
    )
    return trainer, {"global_step": step, "loops": {"fit_loop": {"epoch_loop.state_dict": {"left": left}}}}


def logged(path: Path) -> CSVMetrics:
    logger = CSVMetrics(path)
    for step in range(5):
        logger.log_metrics({"train/loss": step / 10}, step=step)
    logger.log_metrics({"val/loss": 0.25, "epoch": 0}, step=0)
    logger.log_metrics({"val/loss": 0.5, "epoch": 0}, step=2)
    logger.save()
    return logger


@pytest.mark.parametrize("left, val", [("end", [(1, 0.25), (3, 0.5)]), ("validation", [(1, 0.25)])])
def test_the_loss_curve_begins_with_what_was_logged(tmp_path: Path, left: str, val: list) -> None:
    trainer, checkpoint = going_on([logged(tmp_path / "metrics.csv")], left=left)
    ContinueRun().on_load_checkpoint(trainer, None, checkpoint)
    (curve,) = trainer.callbacks
    # A validation that is made again is noted again.
    assert (curve._train, curve._val) == ([(1, 0.0), (2, 0.1), (3, 0.2)], val)


def test_a_validation_that_is_made_again_is_not_logged_again(tmp_path: Path) -> None:
    logger = logged(tmp_path / "metrics.csv")
    trainer, checkpoint = going_on([logger], left="validation")
    ContinueRun().on_load_checkpoint(trainer, None, checkpoint)
    for step, value in ((2, 0.5), (2, 0.75), (4, 0.125)):
        logger.log_metrics({"val/loss": value, "epoch": 0}, step=step)
    logger.save()
    # The second at step 2 is somebody else's.
    assert points(logger.path, "val/loss") == [(1, 0.25), (3, 0.5), (3, 0.75), (5, 0.125)]


def test_a_validation_before_a_resumed_fit_is_logged_at_its_step(tmp_path: Path) -> None:
    """Until the fit begins: an uninterrupted run has no such row."""
    trainer, checkpoint = going_on([logger := logged(tmp_path / "metrics.csv")], fn="validate")
    ContinueRun().on_load_checkpoint(trainer, None, checkpoint)
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == 3
    assert len(points(logger.path, "train/loss")) == 5


def test_the_first_row_of_a_run_without_a_checkpoint_stays(tmp_path: Path) -> None:
    trainer, _ = going_on([logger := logged(tmp_path / "metrics.csv")])
    going = ContinueRun()
    going.on_validation_start(trainer, None)
    assert points(logger.path, "train/loss") == []
    logger.log_metrics({"val/loss": 4.0}, step=0)
    going.on_train_start(trainer, None)
    logger.save()
    assert points(logger.path, "val/loss") == [(1, 4.0)]
    # A run that does not go on leaves the folder alone.
    ContinueRun(continues=False).on_train_start(trainer, None)
    assert points(logger.path, "val/loss") == [(1, 4.0)]


@pytest.mark.parametrize("row", [None, {"step": 2, "epoch": 0, "train/loss": 0.75}])
def test_tensorboard_shows_no_point_twice(tmp_path: Path, row: dict | None) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the package tensorboard is not installed"
    )
    first = tensorboard(tmp_path)
    for step in range(5):
        first.log_metrics({"train/loss": step / 4}, step=step)
    first.finalize("success")
    second = tensorboard(tmp_path)
    # Lightning has opened it before, for the hyper-parameters.
    second.experiment.add_text("a", "b")
    trainer, checkpoint = going_on([second])
    ContinueRun().on_load_checkpoint(trainer, None, checkpoint | ({} if row is None else {ROW: row}))
    second.log_metrics({"train/loss": 8.0}, step=3)
    second.finalize("success")
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(0, 0.0), (1, 0.25), (2, 0.5 if row is None else 0.75), (3, 8.0)]


LONG = ["trainer.max_steps=40", "callbacks.checkpoint.every_n_train_steps=1000"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stops."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(folder, *LONG)
    return folder


@pytest.mark.parametrize("whom", ["parent", "child"])
def test_a_preempted_run_saves_and_goes_on(tmp_path: Path, straight: Path, whom: str) -> None:
    """SIGTERM to one process, in the middle of training: all ranks stop after the same step."""
    stopped = tmp_path / "stopped"
    with open(tmp_path / "told", "w+") as told:
        run = subprocess.Popen(
            [
                sys.executable,
                "train.py",
                f"hydra.run.dir={stopped}",
                *SMALL,
                *LONG,
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
    told_again = train(stopped, *LONG)
    assert "checkpoints/preempted.ckpt" in told_again
    wanted, found = tensors(straight), tensors(stopped)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    for key in ("train/loss", "val/loss"):
        assert points(stopped / "metrics.csv", key) == points(straight / "metrics.csv", key)
