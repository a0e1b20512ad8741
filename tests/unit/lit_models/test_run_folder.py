"""A run folder has one writer, and what a power cut leaves in it does not keep a whole checkpoint from being used.

Catches a second run in the folder of a living one, a finished run that is written over because RANK was left in the
environment, zeros or a cut header in metrics.csv, a damaged config.yaml, and shared memory that is told as the disk.
"""

from __future__ import annotations

import errno
import json
import multiprocessing.heap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lightning_npu_tp import ConfigError
from lightning_npu_tp.checkpoint import locks
from lightning_npu_tp.checkpoint.locks import Holder
from lightning_npu_tp.errors import DataError
from lit_models.run.continued import points
from lit_models.run.loggers import CSVMetrics, read_rows
from lit_models.run.run_folder import RunFolderError, claim, explain_write_errors, sole_writer

LOCK = ".run.lock"


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with sole_writer(tmp_path):
        with pytest.raises(ConfigError, match=f"is being written: process {os.getpid()} of .*hydra.run.dir="):
            with sole_writer(tmp_path):
                pytest.fail("two runs in one folder")
    assert list(tmp_path.iterdir()) == []
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    me = Holder.me("training")
    (tmp_path / LOCK).write_text(json.dumps(vars(Holder(me.host, gone.pid, me.started, "training"))))
    with sole_writer(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid(), "a killed run's lock is in the way"


def test_a_run_of_another_host_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(locks, "STALE_AFTER_S", 0.5)
    (tmp_path / LOCK).write_text(json.dumps(vars(Holder("another-host", 5, 0.0, "training"))))
    with sole_writer(tmp_path):
        pass
    assert "process 5 of another-host is training it" in capfd.readouterr().err


@pytest.mark.parametrize("sign", ["metrics.csv", "checkpoints", "config.yaml"])
def test_whoever_writes_claims_the_folder_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sign: str
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("SLURM_PROCID", "3")
    (tmp_path / sign).touch()
    with pytest.raises(ConfigError, match="already holds a run"):
        claim(tmp_path, OmegaConf.create({"a": 1}))
    assert [path.name for path in tmp_path.iterdir()] == [sign]


@pytest.mark.parametrize("content", [b"", bytes(100), b"a: 1\nb: [", b"a: 1\n" + bytes(50), b"\xff\xfe\x00", b"5\n"])
def test_a_damaged_config_does_not_keep_a_run_from_going_on(tmp_path: Path, content: bytes, capsys: Any) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    config = OmegaConf.create({"resume": "auto", "a": 1})
    claim(tmp_path, config)
    assert OmegaConf.load(tmp_path / "config.yaml") == config
    assert (tmp_path / "config.yaml.damaged").read_bytes() == content
    assert "config.yaml.damaged now" in capsys.readouterr().out
    claim(tmp_path, config)
    assert capsys.readouterr().out == ""


HEADER = b"step,train/loss,val/loss\n"
ROWS = b"0,1.5,\n1,1.25,2.0\n"


@pytest.mark.parametrize(
    "tail",
    [bytes(4000), b"2,1.", b"2,1.0\n", b"2,x,\n", b"\xff\xfe\n", b"2,1" + bytes(30) + b"\n", b"x,1.0,\n", b"2,1,2,3\n"],
)
def test_rows_that_a_power_cut_left_unreadable_go_and_the_others_stay(tmp_path: Path, tail: bytes) -> None:
    file = tmp_path / "metrics.csv"
    file.write_bytes(HEADER + ROWS + tail)
    assert points(file, "train/loss") == [(1, 1.5), (2, 1.25)]
    logger = CSVMetrics(file)
    logger.go_on(2, {"step": 1, "train/loss": 1.25})
    logger.log_metrics({"train/loss": 1.125, "lr": 0.5}, 2)
    logger.finalize("success")
    assert file.read_text() == "step,train/loss,val/loss,lr\n0,1.5,,\n1,1.25,2.0,\n2,1.125,,0.5\n"


@pytest.mark.parametrize("content", [b"", b"st", b"step,train/lo", bytes(512), bytes(8) + HEADER, b"\xff\n" + ROWS])
def test_rows_without_a_header_are_set_aside(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "metrics.csv"
    file.write_bytes(content)
    assert read_rows(file)[0] == [] and points(file, "train/loss") == []
    logger = CSVMetrics(file)
    logger.go_on(3, {"step": 2, "train/loss": 0.5})
    logger.finalize("success")
    assert file.read_text() == "step,train/loss\n2,0.5\n"
    assert (tmp_path / "metrics.csv.damaged").read_bytes() == content


def test_shared_memory_that_is_full_is_not_told_as_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(multiprocessing.heap.os, "ftruncate", full)
    with pytest.raises(DataError, match=r"Shared memory \(/dev/shm\) is full.*data\.num_workers"):
        with explain_write_errors(tmp_path):
            multiprocessing.heap.Arena(1 << 20)
    monkeypatch.undo()
    torchs = "unable to write to file </torch_77_1>: No space left on device (28)"
    for error in (RuntimeError(torchs), OSError(errno.ENOSPC, "No space left on device", "/dev/shm/x")):
        with pytest.raises(DataError, match="Shared memory"), explain_write_errors(tmp_path):
            raise error
    with pytest.raises(RunFolderError, match="The run folder cannot be written"), explain_write_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "metrics.csv"))
