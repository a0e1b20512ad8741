"""What an error of a trainer call means, noted on the error itself: its type, text and traceback stay.

The one boundary at which faults of devices and collectives are explained: around a whole call, so that setup,
validation and checkpoints are covered as well, and inside of Lightning's teardown, which closes the groups. What is
said is `explain_collective.py`'s and `explain_device.py`'s.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_npu_tp.devices.fault_table import MEMORY
from lightning_npu_tp.errors import LightningNPUTPError, RankFailure
from lightning_npu_tp.launch.process_group import host_watch
from lightning_npu_tp.trainer.explain_collective import about_collective, failed_collective
from lightning_npu_tp.trainer.explain_device import about_device, device_fault


class Explanation(str):
    """A note that this module has added to an error."""


def noted(error: BaseException, trainer: Any = None) -> BaseException:
    """The error with a note that explains it; without one for an error that is neither a device's nor a collective's.

    trainer: whose call it was; see `about_device`.
    It is another error only where full memory was not told as such: a torch.OutOfMemoryError with the same text and
    traceback, so that a script can catch full memory on every kind of device by one class.
    """
    if not is_foreign(error) or any(isinstance(note, Explanation) for note in getattr(error, "__notes__", ())):
        return error
    if collective := failed_collective(error):
        error.add_note(Explanation(about_collective(error, collective, host_watch())))
        return error
    if (found := device_fault(error, is_cpu=_is_cpu(trainer))) is None:
        return error
    fault, logged = found
    note = Explanation(about_device(error, fault, logged, trainer))
    if fault in MEMORY and not isinstance(error, torch.OutOfMemoryError):
        error = torch.OutOfMemoryError(str(error)).with_traceback(error.__traceback__)
    error.add_note(note)
    return error


def may_hang(error: BaseException) -> bool:
    """Whether, after this error, asking the device for anything may raise or never return. Full memory is none."""
    if isinstance(error, RankFailure):
        return True
    if not is_foreign(error) or isinstance(error, torch.OutOfMemoryError):
        return False
    if failed_collective(error):
        return True
    found = device_fault(error, is_cpu=False)
    return found is not None and found[0] not in MEMORY


def is_foreign(error: BaseException) -> bool:
    """Whether a library may have raised it for a device or a collective, and not this package on purpose."""
    return isinstance(error, RuntimeError | ConnectionError) and not isinstance(error, LightningNPUTPError)


def _is_cpu(trainer: Any) -> bool:
    device = getattr(getattr(trainer, "strategy", None), "root_device", None)
    return getattr(device, "type", "cpu") == "cpu"
