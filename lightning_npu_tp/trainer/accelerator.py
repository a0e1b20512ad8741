"""The Ascend NPU as a Lightning accelerator: `Trainer(accelerator="npu")`.

It parses the devices asked for, makes one current and reports its memory. How many ranks there are
and what they compute is the strategy's part; what an NPU is and whether there is one, device.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from typing_extensions import override

from lightning_npu_tp.devices import device as devices_of_this_machine
from lightning_npu_tp.devices.device import NPU
from lightning_npu_tp.errors import ConfigError, DeviceError

_STRATEGY = "npu_tp"


class NPUAccelerator(Accelerator):
    """Trains on Ascend NPUs. Raises DeviceError when made on a machine that cannot use one."""

    def __init__(self) -> None:
        # Here and not in `is_available`, whose answer Lightning turns into a sentence without a reason.
        problem = devices_of_this_machine.npu_problem()
        if problem is not None:
            raise DeviceError(
                f"trainer.accelerator={NPU} cannot be used here: {problem} To run without an NPU, set "
                f"trainer.accelerator=cpu."
            )

    @override
    def setup_device(self, device: torch.device) -> None:
        """Make `device` the current NPU.

        Raises ConfigError for a device that is no NPU: left without a strategy, Lightning would put a
        single-device run of an accelerator it does not know on the CPU, and say nothing.
        """
        if device.type != NPU:
            raise ConfigError(
                f"accelerator={NPU!r} was asked for, but the strategy placed this run on the device {device.type!r}. "
                f"Pass Trainer(accelerator={NPU!r}, strategy={_STRATEGY!r})."
            )
        devices_of_this_machine.torch_module(NPU).set_device(device)

    @override
    def teardown(self) -> None:
        """Give the cached memory back."""
        devices_of_this_machine.torch_module(NPU).empty_cache()

    @override
    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """The allocator's counters of `device`, for DeviceStatsMonitor."""
        return devices_of_this_machine.torch_module(NPU).memory_stats(device)

    @staticmethod
    @override
    def parse_devices(devices: int | str | Sequence[int]) -> list[int]:
        """Turn trainer.devices into the indices of NPUs, ascending as given.

        devices: "auto", -1 or "-1" for all; a number or its text ("2") for that many; a list or its
        text ("0,1") for those. Raises ConfigError for what is none of these, repeated, or not there.
        """
        count = devices_of_this_machine.npu_device_count()
        wanted = _indices(devices, count)
        if len(set(wanted)) != len(wanted):
            raise ConfigError(f"trainer.devices={devices!r} names a device twice. Name each once.")
        absent = [index for index in wanted if not 0 <= index < count]
        if absent:
            raise ConfigError(
                f"trainer.devices={devices!r} asks for {len(wanted)} NPUs with indices up to {max(wanted)}, but this "
                f"machine has {count}, 0 to {count - 1}. Set trainer.devices to at most {count}."
            )
        return wanted

    @staticmethod
    @override
    def get_parallel_devices(devices: Sequence[int]) -> list[torch.device]:
        """One torch device per index that `parse_devices` returned."""
        return [torch.device(NPU, index) for index in devices]

    @staticmethod
    @override
    def auto_device_count() -> int:
        """Number of NPUs that this process may use."""
        return devices_of_this_machine.npu_device_count()

    @staticmethod
    @override
    def is_available() -> bool:
        """Whether an NPU can be used; never raises."""
        return devices_of_this_machine.npu_is_available()

    @staticmethod
    @override
    def name() -> str:
        """The name under which the Trainer knows this accelerator."""
        return NPU

    @classmethod
    @override
    def register_accelerators(cls, accelerator_registry: Any) -> None:
        """Enter this class into Lightning's registry; again, where it is there already."""
        accelerator_registry.register(cls.name(), cls, description="Ascend NPU", override=True)


def _indices(devices: Any, count: int) -> list[int]:
    value = devices.strip() if isinstance(devices, str) else devices
    if value in ("auto", "-1") or (type(value) is int and value == -1):
        return list(range(count))
    try:
        if isinstance(value, str) and "," in value:
            return [int(part) for part in value.split(",") if part.strip()]
        if isinstance(value, str):
            value = int(value)
    except ValueError:
        value = None
    if type(value) is int and value > 0:
        return list(range(value))
    if isinstance(value, Sequence) and value and all(type(index) is int for index in value):
        return list(value)
    raise ConfigError(
        f"trainer.devices={devices!r} names no devices. Set it to 'auto', a number of NPUs, or a list of their indices."
    )


# Here and not in registration.py, which may meet this module half imported.
NPUAccelerator.register_accelerators(AcceleratorRegistry)
