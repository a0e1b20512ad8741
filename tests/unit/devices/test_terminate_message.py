"""The message of a process that C++ ends. Catches a text that is not written, a process that then lives on, and one
that is written after the run is over."""

from __future__ import annotations

import signal
import subprocess
import sys

from lightning_npu_tp.devices.terminate_message import terminate_message

START = (
    "import ctypes, threading\n"
    "from lightning_npu_tp.devices.terminate_message import *\n"
    "from lightning_npu_tp.devices.terminate_message import clear_terminate_message, set_terminate_message\n"
)
# As a watchdog does it: in a thread that Python did not start anything in.
END = "thread = threading.Thread(target=ctypes.CDLL('libstdc++.so.6')._ZSt9terminatev)\nthread.start()\nthread.join()"


def run(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", START + text + END], capture_output=True, text=True, timeout=60)


def test_the_words_are_said_once_before_the_end_that_would_come_anyway():
    done = run("set_terminate_message('first')\nset_terminate_message('cause and remedy')\n")
    assert done.returncode == -signal.SIGABRT
    assert "\ncause and remedy\nterminate called" in done.stderr and "first" not in done.stderr


def test_after_the_run_nothing_is_said():
    done = run("set_terminate_message('cause and remedy')\nclear_terminate_message()\n")
    assert done.returncode == -signal.SIGABRT
    assert "terminate called" in done.stderr and "cause and remedy" not in done.stderr


def test_the_words_name_rank_cause_and_remedy():
    words = terminate_message(3, "node-a")
    for part in ("rank 3 of host node-a", "it failed, hangs, or is slow", "the logs of the other ranks", "timeout_s"):
        assert part in words
