"""What a process says that a thread of NCCL or torch_npu ends: what happened and what to do.

When a collective fails or outlasts its time-out, the watchdog threads of both libraries throw an exception that nobody
catches, so that a rank cannot go on with half a result. C++ then ends the process at once: no error reaches Python, and
what can be read is a code without a meaning. C++ lets a program say something at that moment (`std::set_terminate`).
Turning the watchdogs off instead would let a run that hangs go on hanging.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from typing import Any

from lightning_npu_tp.devices.fault_table import COLLECTIVES

_HANDLER = ctypes.CFUNCTYPE(None)
# The handler, its text, and the one before it; the callback must live as long as C++ may call it.
_installed: tuple[Any, Any] | None = None


def terminate_message(rank: int, host: str) -> str:
    """What the process says when it is ended: rank, cause and remedy, as in docs/troubleshooting.md."""
    watchdog = next(fault for fault in COLLECTIVES if fault.code == "watchdog")
    return (
        f"error: rank {rank} of host {host} is ended by a thread of its communication library, which names the "
        f"collective and the code in the lines around this one: it failed or outlasted its time-out. {watchdog.cause} "
        f"Check: {watchdog.check} Change: {watchdog.change} Starting again {watchdog.restart}."
    )


def set_terminate_message(text: str) -> None:
    """Write the text to stderr when C++ ends this process, before what it does then; a second call replaces it."""
    global _installed
    clear_terminate_message()
    set_terminate = _set_terminate()
    if set_terminate is None:
        return
    line = f"\n{text}\n".encode()
    previous: Any = None

    def speak() -> None:
        # Nothing but system calls: this thread is not Python's, and the others go on meanwhile.
        with contextlib.suppress(OSError):
            os.write(2, line)
        if previous:
            _HANDLER(previous)()
        os.abort()

    handler = _HANDLER(speak)
    previous = set_terminate(ctypes.cast(handler, ctypes.c_void_p))
    _installed = (handler, previous)


def clear_terminate_message() -> None:
    """Undo `set_terminate_message`."""
    global _installed
    set_terminate = _set_terminate()
    if _installed is not None and set_terminate is not None:
        set_terminate(_installed[1])
    _installed = None


def _set_terminate() -> Callable[[Any], Any] | None:
    """std::set_terminate of the C++ library that torch uses; None where that is another one."""
    try:
        function = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
    return function
