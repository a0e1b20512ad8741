"""Watches what a piece of code opens, writes and changes while it reads what a stranger made.

Python's audit events tell of every file that is opened and every name that is made, moved or removed. Reading is
allowed in the stranger's folder and among the programs' own files, writing only where a test says so. A canary lies
outside: what it holds must turn up nowhere.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

SECRET = "the-secret-of-the-canary"
MAX_CPU_S = 2.0
MAX_MIB = 256
_HANGS_AFTER_S = 60
_ROOT = str(Path(__file__).parents[1])
_OF_PROGRAMS = (sys.prefix, sys.base_prefix, _ROOT, "/proc", "/sys", "/usr", "/lib", "/dev/null")
_ONE_NAME = {"os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.chmod", "os.chown", "os.utime"}
_CHANGES = _ONE_NAME | {"os.rename", "os.link"}
_RUNS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "ctypes.dlopen"}
_watched: list[Sandbox] = []


class Sandbox:
    """What was done while `watching`: `broken` holds each thing that was not allowed.

    folder: may be read; locks may come and go in it. out: may be written as well.
    """

    def __init__(self, folder: Path, out: Path, canary: Path) -> None:
        self.folder, self.out, self.canary = folder.resolve(), out.resolve(), canary.resolve()
        self.broken: list[str] = []

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _RUNS:
            self.broken.append(f"{event}{arguments}")
        elif event == "open":
            path, mode, flags = arguments
            if isinstance(path, int) or "__pycache__" in os.fsdecode(path):
                return
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if isinstance(flags, int) else "r" not in mode
            self._path(event, path, writes)
        elif event in _CHANGES:
            for path in arguments[: 1 if event in _ONE_NAME else 2]:
                folder = arguments[-1]
                if isinstance(folder, int) and folder >= 0 and event in ("os.remove", "os.rmdir"):
                    path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
                self._path(event, path, True)

    def _path(self, event: str, path: Any, writes: bool) -> None:
        # Where a link leads is what is read.
        real = os.path.realpath(os.fsdecode(path))
        allowed = [str(self.out)] if writes else [str(self.folder), str(self.out), *_OF_PROGRAMS]
        # Locks, which are made as files without a name, and a look at the file server's clock.
        name = os.path.basename(real)
        if real == str(self.folder) or (
            os.path.dirname(real) == str(self.folder) and name.startswith((".clock-", ".forged", "#"))
        ):
            return
        if not any(real == place or real.startswith(f"{place}/") for place in allowed):
            self.broken.append(f"{event} {path} ({'writes' if writes else 'reads'} {real})")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch, and hold the code to MAX_CPU_S and MAX_MIB; what hangs is a TimeoutError."""

        def too_long(number: int, frame: FrameType | None) -> None:
            raise TimeoutError(f"hangs for {_HANGS_AFTER_S} s")

        before = signal.signal(signal.SIGALRM, too_long)
        signal.alarm(_HANGS_AFTER_S)
        memory, start = _peak_mib(), time.process_time()
        _watched.append(self)
        try:
            yield
        finally:
            _watched.remove(self)
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
            took, grew = time.process_time() - start, _peak_mib() - memory
            if took > MAX_CPU_S:
                self.broken.append(f"took {took:.1f} s of a processor")
            if grew > MAX_MIB:
                self.broken.append(f"took {grew:.0f} MiB")

    def secrets(self) -> list[Path]:
        """Files of `out` that hold what the canary holds."""
        files = [file for file in self.out.rglob("*") if file.is_file() and not file.is_symlink()]
        return [file for file in files if SECRET.encode() in file.read_bytes()]


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched and (event == "open" or event.startswith(("os.", "subprocess.", "socket.", "ctypes."))):
        _watched[-1].hear(event, arguments)


sys.addaudithook(_hook)
