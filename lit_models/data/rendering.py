"""Chat templates rendered within limits of time and memory, by a process of their own; see `render_worker`.

The process takes about a second to start, so it is kept while a block of `kept` runs, and serves all templates. What a
template means for training is not known here.
"""

from __future__ import annotations

import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_npu_tp import DataError

SECONDS = 10.0  # for all renderings of one conversation
_START = 120.0  # seconds for the process to import transformers, on a machine at work
_WORKER = Path(__file__).with_name("render_worker.py")


@dataclass(frozen=True)
class Job:
    """The first `count` messages and `more` behind them, with the prompt for the assistant's next turn or without."""

    count: int
    more: tuple[dict[str, Any], ...] = ()
    prompt: bool = False


@dataclass(frozen=True)
class Rendered:
    """A text and the characters of it that stand in {% generation %}; or why there is none."""

    text: str = ""
    spans: tuple[tuple[int, int], ...] = ()
    error: str | None = None


class Renderer:
    """Renders the conversations of one template.

    special: names and texts of the tokenizer's special tokens, which templates use.
    """

    def __init__(self, template: str, special: dict[str, Any], *, marks: bool) -> None:
        self._fixed = {"template": template, "special": special, "marks": marks}

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        jobs: Sequence[Job],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        seconds: float | None = None,
    ) -> list[Rendered]:
        """Each job's text. Raises DataError, to which the caller adds what was rendered, where a limit is reached."""
        asked = [[job.count, job.more, job.prompt] for job in jobs]
        try:
            request = json.dumps({**self._fixed, "messages": messages, "tools": tools, "jobs": asked}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"it holds what JSON does not: {error}") from error
        with kept(), _LOCK:
            answer = _process().ask(request, SECONDS if seconds is None else seconds)
        return [
            Rendered(one.get("text", ""), tuple(map(tuple, one.get("spans", ()))), one.get("error")) for one in answer
        ]


class _Process:
    def __init__(self) -> None:
        self.parent = os.getpid()
        # Isolated: neither the working folder nor PYTHONSTARTUP and the like have a say; the paths are this process's.
        self._child = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER), json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # an interrupt from the keyboard is this process's to answer
        )
        self._fresh = True

    @property
    def lives(self) -> bool:
        """Whether it can be asked, by this process."""
        return self.parent == os.getpid() and self._child.poll() is None

    def ask(self, request: bytes, seconds: float) -> list[dict[str, Any]]:
        """The answer; the process is killed where it does not come in time."""
        limit = time.monotonic() + seconds + (_START if self._fresh else 0)
        try:
            if self._fresh:
                empty = {"template": "", "special": {}, "marks": False, "messages": [], "tools": None}
                self._exchange(json.dumps({**empty, "jobs": [[0, [], False]]}).encode(), limit)
                self._fresh = False
                limit = time.monotonic() + seconds
            return json.loads(self._exchange(request, limit))
        except TimeoutError as error:
            self.kill()
            raise DataError(f"it did not end within {seconds:g} s") from error
        except OSError as error:
            self.kill()
            raise DataError(f"its process ended ({error}), as one does that needs more than 1 GiB of memory") from error
        except BaseException:
            self.kill()  # an interrupt leaves an answer in the pipe that belongs to no later question
            raise

    def _exchange(self, request: bytes, limit: float) -> bytes:
        assert self._child.stdin is not None and self._child.stdout is not None
        data = memoryview(struct.pack("<Q", len(request)) + request)
        while data:
            _wait([], [self._child.stdin], limit)
            data = data[os.write(self._child.stdin.fileno(), data[: select.PIPE_BUF]) :]
        (length,) = struct.unpack("<Q", self._read(8, limit))
        return self._read(length, limit)

    def _read(self, count: int, limit: float) -> bytes:
        assert self._child.stdout is not None
        parts = bytearray()
        while len(parts) < count:
            _wait([self._child.stdout], [], limit)
            part = os.read(self._child.stdout.fileno(), min(count - len(parts), 2**20))
            if not part:
                raise BrokenPipeError("no answer")
            parts += part
        return bytes(parts)

    def kill(self) -> None:
        """End it, if it is this process's."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        if self.parent == os.getpid():
            self._child.kill()
            self._child.wait()


def _wait(reading: list[Any], writing: list[Any], limit: float) -> None:
    poll = select.poll()  # select() refuses descriptors beyond 1023
    for files, event in ((reading, select.POLLIN), (writing, select.POLLOUT)):
        for file in files:
            poll.register(file, event)
    if not poll.poll(max(0.0, limit - time.monotonic()) * 1000):
        raise TimeoutError


_LOCK = threading.Lock()
_CURRENT: list[_Process] = []
_HOLDERS = 0


@contextmanager
def kept() -> Iterator[None]:
    """Keep the process between the conversations of a block; behind the outermost one it has ended."""
    global _HOLDERS
    with _LOCK:
        _HOLDERS += 1
    try:
        yield
    finally:
        with _LOCK:
            _HOLDERS -= 1
            if not _HOLDERS and _CURRENT:
                _CURRENT.pop().kill()


def _process() -> _Process:
    """The running process, or a new one."""
    if _CURRENT and not _CURRENT[0].lives:
        _CURRENT.pop().kill()
    if not _CURRENT:
        _CURRENT.append(_Process())
    return _CURRENT[0]
