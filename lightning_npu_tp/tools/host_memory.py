"""Memory of this host and of this process: what is free, and the most that a stretch of work held.

Counted is anonymous memory, so that pages of mapped files, which the system can take back, are nobody's. What a
device's allocator holds is asked of the device (`device.py`).
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
from typing_extensions import override

_STATUS = Path("/proc/self/status")
_LIMITS = ((Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),)
_EVERY_S = 0.005


def available_bytes() -> int:
    """What new processes of this host could take, within the limit of this process's control group."""
    free = int(psutil.virtual_memory().available)
    for limit, used in _LIMITS:
        try:
            # The group's own use counts pages of files that would be given back, so this errs on the careful side.
            free = min(free, max(0, int(limit.read_text()) - int(used.read_text())))
        except (OSError, ValueError):
            # No such group, or "max": no limit.
            continue
    return free


def anonymous_bytes() -> int:
    """Anonymous memory of this process; all resident memory where the system does not tell them apart."""
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return int(psutil.Process().memory_info().rss)
    return 1024 * int(line.split()[1])


class HostPeak(threading.Thread):
    """Looks at this process's memory every few milliseconds, as `with HostPeak() as peak:`.

    before: bytes when it began. value: the most since then. What comes and goes in between is not seen.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True, name="host_peak")
        self.before = self.value = anonymous_bytes()
        self._running = True

    @override
    def run(self) -> None:
        """Look until the block ends."""
        while self._running:
            self.value = max(self.value, anonymous_bytes())
            time.sleep(_EVERY_S)

    def __enter__(self) -> HostPeak:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.value = max(self.value, anonymous_bytes())
        self._running = False
        self.join()

    @property
    def grown(self) -> int:
        """Bytes at the peak above those of the beginning."""
        return self.value - self.before
