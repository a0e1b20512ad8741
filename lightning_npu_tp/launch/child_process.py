"""Start a process of this run, hear from it, and end it.

A child is tied to its parent's life from before its first import (`parent_death.py`; elsewhere than on Linux by a
thread that watches the parent once the child opens its channel). Its stderr passes through this process
byte for byte while the last lines are kept, and it can report over a pipe of its own what its exit code
cannot say: that it has raised and is still unwinding, or that it was asked to terminate. What a report
means for the run is decided in `supervisor.py`; Lightning and Hydra are unknown here.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import selectors
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import psutil

from lightning_npu_tp.devices.fault_text import may_be_lost_peer
from lightning_npu_tp.launch import parent_death

TAIL_LINES = 200
# What a child may need to unwind after SIGTERM before it is killed.
TERMINATE_SECONDS = 3.0

_CHANNEL_VARIABLE = "LIGHTNING_NPU_TP_CHANNEL"


class ChildProcess:
    """One process started by this one.

    name: what reports call it, e.g. "rank 1".
    muted: what it writes to stderr is kept, but not passed on. What it writes after it has raised is passed on when its
        next call begins: if it ends instead, its traceback is the supervisor's to tell, once.
    events: what it said over its channel, oldest first; each a dict with "event" and "time" (time.monotonic,
        which is one clock for all processes of a machine).
    """

    def __init__(self, name: str, command: Sequence[str], *, env: Mapping[str, str], cwd: str | None = None) -> None:
        self.name = name
        self.events: list[dict[str, Any]] = []
        self.muted = False
        self.ended_by_us = False
        self.dead_since: float | None = None
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)
        read_fd, write_fd = os.pipe()
        try:
            self.process = subprocess.Popen(
                # Not by Popen's preexec_fn: no Python code runs between fork and exec of a process that has threads.
                [sys.executable, "-I", "-S", parent_death.__file__, str(os.getpid()), *command],
                env={**env, _CHANNEL_VARIABLE: f"{write_fd}:{os.getpid()}"},
                cwd=cwd,
                stderr=subprocess.PIPE,
                pass_fds=(write_fd,),
            )
        finally:
            os.close(write_fd)
        assert self.process.stderr is not None
        self._reader = threading.Thread(
            target=self._read_output,
            args=(self.process.stderr.fileno(), read_fd),
            name=f"output of {name}",
            daemon=True,
        )
        self._reader.start()

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs. Once it does not, everything that it wrote has been read."""
        if self.process.poll() is None:
            return True
        if self.dead_since is None:
            self.drain()
            self.dead_since = time.monotonic()
        return False

    @property
    def exit_code(self) -> int | None:
        """The exit code as a shell counts it (128 + n for signal n), None while it runs."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def last(self, *kinds: str) -> dict[str, Any] | None:
        """The latest report of one of these kinds, if any."""
        return next((entry for entry in reversed(list(self.events)) if entry["event"] in kinds), None)

    @property
    def state(self) -> str | None:
        """Where it is: "enter" inside a trainer call, "leave" after one, "raised" while or after one raised."""
        latest = self.last("enter", "leave", "raised")
        return None if latest is None else str(latest["event"])

    def count(self, event: str) -> int:
        """How often the process has sent a report of the kind `event`."""
        return sum(entry["event"] == event for entry in list(self.events))

    def drain(self, seconds: float = 1.0) -> None:
        """Wait until everything that a dead process wrote has been read.

        Bounded, because a grandchild may hold the pipes open for longer.
        """
        self._reader.join(seconds)

    def describe_end(self) -> str:
        """How the process ended (exit code or signal), in words."""
        code = self.process.poll()
        if code is None:
            return "is still running"
        if code < 0:
            return f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"ended with exit code {code}"

    def tail(self) -> str:
        """The last lines of the process's stderr."""
        return "\n".join(list(self._lines)).rstrip()

    def traceback(self) -> str:
        """The traceback of its failure: as reported if it was, else the last one on its stderr, else "".

        A script may catch what a call raised, and end of another error later: both are told then.
        """
        printed, raised = last_traceback(list(self._lines)), self.last("raised")
        if not raised or self.state != "raised":
            return printed
        reported = str(raised["traceback"]).rstrip()
        if self.is_alive or not printed or printed.splitlines()[-1] == reported.splitlines()[-1]:
            return reported
        return f"{reported}\n\nLater it ended with another error:\n\n{printed}"

    def _read_output(self, stderr_fd: int, channel_fd: int) -> None:
        partial, held = {stderr_fd: b"", channel_fd: b""}, b""
        with selectors.DefaultSelector() as selector:
            for fd in partial:
                selector.register(fd, selectors.EVENT_READ)
            while selector.get_map():
                # Reports first: they decide whether what was written after them is passed on.
                for fd in sorted((key.fd for key, _ in selector.select()), key=lambda fd: fd != channel_fd):
                    if not (chunk := os.read(fd, 65536)):
                        selector.unregister(fd)
                    if fd == stderr_fd:
                        held += chunk
                    if self.state != "raised" and not self.muted:
                        _write_all(2, held)
                        held = b""
                    *lines, partial[fd] = (partial[fd] + chunk).split(b"\n")
                    if not chunk and partial[fd]:
                        lines.append(partial[fd])
                    if fd == stderr_fd:
                        # Of a line that a progress bar redrew, only what stood there last.
                        shown = (line.rstrip(b"\r").split(b"\r")[-1] for line in lines)
                        self._lines.extend(line.decode(errors="replace") for line in shown)
                    else:
                        self.events.extend(json.loads(line) for line in lines)
        os.close(channel_fd)
        # Held for the report of what was raised last; it was caught, and nobody will report it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            if held and self.process.wait(timeout=5) == 0:
                _write_all(2, held)


class Channel:
    """The child's end of the pipe to the process that started it."""

    def __init__(self, fd: int, parent: int) -> None:
        self._fd = fd
        self._parent = parent
        self._lock = threading.Lock()
        if sys.platform != "linux":
            threading.Thread(target=self.end_with_parent, name="parent watch", daemon=True).start()

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a trainer call of this rank and report its begin and its end."""
        self.send("enter")
        try:
            result = function()
        except BaseException as error:
            text = "".join(traceback.format_exception(error))
            self.send("raised", traceback=text, may_be_lost_peer=may_be_lost_peer(error))
            raise
        self.send("leave")
        return result

    def send(self, event: str, **details: Any) -> None:
        """Send a report to the parent; silently does nothing once that is gone."""
        line = json.dumps({"event": event, "time": time.monotonic(), **details}) + "\n"
        with self._lock:
            try:
                _write_all(self._fd, line.encode())
            except BrokenPipeError:
                pass

    def end_with_parent(self, poll_seconds: float = 1.0) -> None:
        """Wait until the parent has died, then end this process."""
        while os.getppid() == self._parent:
            time.sleep(poll_seconds)
        os._exit(1)


@functools.cache
def parent_channel() -> Channel | None:
    """The channel to the process that started this one, None if that was not a `ChildProcess`.

    The variable is taken out of the environment, and checked: a program that this process starts later must not
    write into a descriptor that means something else there.
    """
    fd_text, _, parent_text = os.environ.pop(_CHANNEL_VARIABLE, "").partition(":")
    if not parent_text or int(parent_text) != os.getppid():
        return None
    fd = int(fd_text)
    try:
        is_pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)
    except OSError:
        return None
    os.set_inheritable(fd, False)
    return Channel(fd, int(parent_text)) if is_pipe else None


def end_processes(children: Iterable[ChildProcess], *, patience: float = TERMINATE_SECONDS) -> None:
    """End processes and all that they started: SIGTERM, up to `patience` seconds, then SIGKILL; then reap them."""
    living = [child for child in children if child.is_alive]
    descendants = [process for child in living for process in _descendants(child.process.pid)]
    for child in living:
        child.ended_by_us = True
        child.process.terminate()
    deadline = time.monotonic() + patience
    while any(child.is_alive for child in living) and time.monotonic() < deadline:
        time.sleep(0.02)
    for child in living:
        if child.is_alive:
            child.process.kill()
    for process in descendants:
        _kill(process)
    for child in living:
        child.process.wait()
        assert not child.is_alive


def kill_descendants() -> None:
    """Kill at once everything that this process started, e.g. the data workers of a process about to end hard."""
    for process in _descendants(os.getpid()):
        _kill(process)


def last_traceback(lines: Sequence[str]) -> str:
    """The last traceback in these lines with the exceptions that it was raised from; "" if there is none."""
    # torch.distributed prints uncaught exceptions with the rank in front of each line.
    bare = [re.sub(r"^\[rank\d+\]: ?", "", line) for line in lines]
    starts = [i for i, line in enumerate(bare) if line.startswith("Traceback (most recent call last)")]
    if not starts:
        return ""
    links = ("During handling of the above exception", "The above exception was the direct cause")
    while len(starts) > 1 and any(line.startswith(links) for line in bare[starts[-2] : starts[-1]]):
        starts.pop()
    return "\n".join(bare[starts[-1] :]).rstrip()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        pass


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
