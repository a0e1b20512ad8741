"""What a process did on the simulated card: counters, host synchronisations with their lines, stream misuse.

With ASCEND_SIM_REPORT_DIR set, each process that imports torch_npu keeps a file `<pid>.json` there, written every
second and when it ends, so that one that is killed leaves its last second's. With ASCEND_SIM_TRACE_SYNCS=1 the Python
line of each wait is kept.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ascend_sim import hook

REPORT_DIR = "ASCEND_SIM_REPORT_DIR"
TRACE_SYNCS = "ASCEND_SIM_TRACE_SYNCS"
_LIBRARY_FOLDERS = ("/torch/", "/torch_npu/", "/ascend_sim/")

_lines: Counter[str] = Counter()
_listener: Any = None
_started: float | None = None


def counters() -> dict[str, int]:
    """All counters of this process: fallback.<operator>, sync.<call>, hccl.…, memory.peak.<device> in bytes, …"""
    runtime = hook.library("ascendcl")
    runtime.ascend_sim_counters.restype = ctypes.c_int64
    size = runtime.ascend_sim_counters(None, ctypes.c_int64(0)) + 4096
    buffer = ctypes.create_string_buffer(size)
    runtime.ascend_sim_counters(buffer, ctypes.c_int64(size))
    found = {}
    for line in buffer.value.decode().splitlines():
        name, value = line.rsplit(" ", 1)
        found[name] = int(value)
    runtime.ascend_sim_memory.restype = ctypes.c_uint64
    for device in range(int(os.environ.get("ASCEND_SIM_DEVICES", "4"))):
        if peak := runtime.ascend_sim_memory(device, 1):
            found[f"memory.peak.{device}"] = peak
            found[f"memory.used.{device}"] = runtime.ascend_sim_memory(device, 0)
    return found


@contextlib.contextmanager
def between() -> Iterator[dict[str, int]]:
    """Fills the dictionary that it gives, at the end of the block, with what the counters grew by meanwhile."""
    before = counters()
    grown: dict[str, int] = {}
    yield grown
    grown.update({name: value - before.get(name, 0) for name, value in counters().items()})
    for name in [name for name, value in grown.items() if not value]:
        del grown[name]


def synchronisations() -> dict[str, int]:
    """Where the host waited for the device: "call file:line" -> how often. Empty unless traced (`trace_syncs`)."""
    return dict(_lines)


def stream_misuses() -> list[str]:
    """Take the texts of stream misuse that no operator has raised yet."""
    runtime = hook.library("ascendcl")
    buffer = ctypes.create_string_buffer(1024)
    found = []
    while runtime.ascend_sim_take_misuse(buffer, len(buffer)) >= 0:
        found.append(buffer.value.decode())
    return found


def trace_syncs(on: bool = True) -> None:
    """Keep the Python line of each wait of the host from now on, or no longer."""
    global _listener
    kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
    listener = kind(_note) if on else kind()
    hook.library("ascendcl").ascend_sim_on_synchronisation(listener)
    _listener = listener


def _note(call: bytes) -> None:
    stack = traceback.extract_stack()[:-1]
    own = [frame for frame in stack if not any(part in frame.filename for part in _LIBRARY_FOLDERS)]
    frames = own or list(stack)
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "a thread without Python"
    _lines[f"{call.decode()} {where}"] += 1


def start() -> None:
    """Begin this process's report; called once torch_npu is there."""
    global _started
    if _started is not None:
        return
    _started = time.time()
    if os.environ.get(TRACE_SYNCS, "0") not in ("", "0"):
        trace_syncs()
    if os.environ.get(REPORT_DIR):
        atexit.register(write)
        os._exit = _writing_first(os._exit)  # type: ignore[assignment]
        threading.Thread(target=_keep_writing, name="ascend_sim report", daemon=True).start()


def _writing_first(leave: Callable[[int], Any]) -> Callable[[int], Any]:
    def leave_with_report(status: int) -> Any:
        # Whatever is wrong with the report, the process has to end.
        with contextlib.suppress(Exception):
            write()
        return leave(status)

    return leave_with_report


def _keep_writing() -> None:
    while True:
        time.sleep(1)
        with contextlib.suppress(OSError):
            write()


_writing = threading.Lock()
# A process that works for several runs has a rank while it does, and none when it ends.
_last_rank: str | None = None


def write() -> None:
    """Write this process's file of the report now."""
    global _last_rank
    folder = os.environ.get(REPORT_DIR)
    if not folder:
        return
    with _writing:
        _last_rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", _last_rank))
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, f"{os.getpid()}.json")
        content = {
            "pid": os.getpid(),
            "rank": _last_rank,
            "command": sys.argv,
            "started": _started,
            "written": time.time(),
            "counters": counters(),
            "synchronisations": synchronisations(),
        }
        with open(f"{path}.part", "w") as file:
            json.dump(content, file, indent=1)
        os.replace(f"{path}.part", path)
