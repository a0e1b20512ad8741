"""What is said of a dead launch queue. Catches a report that other ranks do not get, and a log that is not found."""

from __future__ import annotations

import os

import pytest

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.devices.launch_queue import dropped
from lightning_npu_tp.launch import launcher


class Ended(BaseException):
    pass


def test_a_rank_that_is_ended_tells_the_one_that_started_it(monkeypatch):
    sent, said = [], []

    class Parent:
        def send(self, event, **details):
            assert not details["may_be_lost_peer"]
            sent.append((event, details["traceback"]))

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(launcher, "parent_channel", Parent)
    monkeypatch.setattr(launcher, "end_now", end)
    monkeypatch.setattr(launcher, "write_to_stderr", said.append)
    strategy = NPUTensorParallelStrategy()
    strategy._launcher = launcher.ProcessLauncher(None, 2, 1)
    with pytest.raises(Ended, match="1"):
        strategy._end_unheard(RuntimeError("EI0004: the table is torn"), None)
    assert sent == [("raised", said[0])]
    # The original first, the meaning below it.
    first, last = said[0].splitlines()
    assert first == "RuntimeError: EI0004: the table is torn"
    assert last.startswith("A call of the device failed on rank 0 ") and "the rank table does not hold" in last


def test_the_log_is_looked_for_where_cann_writes_it(tmp_path, monkeypatch):
    monkeypatch.delenv("ASCEND_PROCESS_LOG_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "ascend" / "log" / "debug" / "plog"
    assert f"would be {folder}/plog-{os.getpid()}_*.log, but is not there" in dropped(os.getpid())
    folder.mkdir(parents=True)
    (folder / f"plog-{os.getpid()}_1.log").write_text("[ERROR] HCCL: of an earlier process\n")
    (folder / f"plog-{os.getpid()}_2.log").write_text("[INFO] all is well\n[ERROR] HCCL: EI0004\n")
    assert dropped(os.getpid()).splitlines()[1:] == ["[ERROR] HCCL: EI0004"]
