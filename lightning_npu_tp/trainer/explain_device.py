"""Errors of the device while a trainer call runs: what they mean and where they happened.

torch_npu, HCCL and CUDA raise RuntimeErrors that hold codes. The table of codes is `devices/fault_table.py`, a failed
collective `explain_collective.py`'s, what held the memory `explain_memory.py`'s. Training pays nothing: all is read
from the error, its traceback and the trainer when it is too late for anything else.
"""

from __future__ import annotations

import os
import socket
import sysconfig
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning_npu_tp.devices.fault_table import MEMORY, Fault
from lightning_npu_tp.devices.fault_text import called, find_fault
from lightning_npu_tp.devices.process_log import logged_errors
from lightning_npu_tp.trainer.explain_collective import frames_of
from lightning_npu_tp.trainer.explain_memory import about_memory

_LIBRARIES = Path(sysconfig.get_paths()["purelib"])
# On a CPU a broken pipe is that of `train.py | head`, or of a data loader.
_ON_CARDS_ONLY = ("BrokenPipe",)


def device_fault(error: BaseException, *, is_cpu: bool) -> tuple[Fault, str] | None:
    """The fault behind an error, and what CANN has logged of it, if the error does not tell; None without a known code.

    is_cpu: the rank computes on the CPU.
    """
    text, logged = str(error), ""
    fault = find_fault(f"{type(error).__name__}: {text}" if isinstance(error, ConnectionError) else text)
    if fault is not None and fault.code.startswith("ERR"):
        # torch_npu's own code says that something failed; what, CANN has perhaps written down.
        logged = logged_errors(os.getpid())
        fault = find_fault(f"{text}\n{logged}") or fault
    if fault is None or (is_cpu and fault.code in _ON_CARDS_ONLY):
        return None
    return fault, logged


def about_device(error: BaseException, fault: Fault, logged: str, trainer: Any) -> str:
    """What failed, on which rank, what it means and what to do; for full memory also what held it.

    trainer: whose call it was; its strategy tells the rank, its module and optimizers what holds the memory.
    """
    operation = called(str(error)) or _place(error.__traceback__)
    rank = getattr(getattr(trainer, "strategy", None), "global_rank", 0)
    meaning = about_memory(error, fault, trainer) if fault in MEMORY else fault.sentence()
    return f"{operation} failed on rank {rank} of host {socket.gethostname()}. {meaning}" + (
        f"\n{logged}" if logged else ""
    )


def _place(traceback: TracebackType | None) -> str:
    """Function, file and line of the innermost frame that is not an installed library's."""
    own = [frame for frame in frames_of(traceback) if not Path(frame[0].f_code.co_filename).is_relative_to(_LIBRARIES)]
    if not own:
        return "A call of the device"
    frame, line = own[-1]
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{line})"
