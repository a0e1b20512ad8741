"""What differs between device types: backend, runtime module, precisions, and whether an NPU can be used.

The one module that spells npu, hccl and torch_npu; everybody else asks here, with the type of a
device in hand. Unknown hardware raises and never falls back. torch_npu is imported only when an NPU
is asked for, and torch only inside functions: `import torch` itself fails on a machine with
torch_npu and without CANN, and this module has to be there to say so. It counts devices but chooses
none; that is the accelerator's part.
"""

from __future__ import annotations

import ctypes
import glob
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType
from typing import Any, Protocol, cast

from lightning_npu_tp.errors import DeviceError

NPU = "npu"

_ALL_PRECISIONS = ("32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed", "64-true")
_BACKENDS = {"cpu": "gloo", "cuda": "nccl", NPU: "cpu:gloo,npu:hccl"}
# The first that torch_npu's own library is linked against; the rest come with it.
_CANN_LIBRARIES = ("libhccl.so", "libascendcl.so")
_SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
_DEVICE_FILES = "/dev/davinci[0-9]*"
_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
# torch's default, by which torch_npu takes it that nobody chose: it waits HCCL's execution time-out and half an hour.
_NOBODYS_TIMEOUT = timedelta(minutes=30)


class RuntimeModule(Protocol):
    """What this package uses of torch.cuda, torch.npu and their stand-in for the CPU."""

    def empty_cache(self) -> None:
        """Give cached memory back to the device."""

    def memory_stats(self, device: Any = None) -> dict[str, Any]:
        """The allocator's counters; bytes and numbers of blocks."""

    def set_device(self, device: Any) -> None:
        """Make `device` the current one of this process."""

    def synchronize(self, device: Any = None) -> None:
        """Wait for all work on the device."""


class _Cpu:
    def empty_cache(self) -> None:
        """Do nothing: the CPU caches no memory."""

    def memory_stats(self, device: Any = None) -> dict[str, Any]:
        """Nothing is counted on the CPU."""
        return {}

    def set_device(self, device: Any) -> None:
        """Do nothing: there is one CPU."""

    def synchronize(self, device: Any = None) -> None:
        """Do nothing: work on the CPU is done when the call returns."""


def backend_for(device_type: str) -> str:
    """The process group's backend, as `init_process_group` wants it named. Raises DeviceError for an unknown device."""
    return _BACKENDS[_known(device_type)]


def group_timeout(device_type: str, timeout: timedelta) -> timedelta:
    """The time-out to ask for so that a group of this device type waits for `timeout`."""
    if device_type == NPU and timeout == _NOBODYS_TIMEOUT:
        return timeout + timedelta(seconds=1)
    return timeout


def group_options(device_type: str, *, timeout: timedelta, buffer_mb: int | None = None) -> tuple[str, Any] | None:
    """Backend and options of a group beside the default one, as `init_device_mesh` takes them; None: torch's own.

    timeout:   of each collective; left to itself, a mesh gives its groups torch's default and not the run's.
    buffer_mb: MB of one of the group's two buffers on npu; None is what the environment says. Unused elsewhere.
    """
    timeout = group_timeout(_known(device_type), timeout)
    if device_type == "cpu":
        from torch.distributed import ProcessGroupGloo

        options = cast(Any, ProcessGroupGloo)._Options()
        options._timeout = timeout
        return backend_for(device_type), options
    if device_type == NPU:
        # Where the default group is bound to a device, a mesh would split it, which hccl cannot; with options it
        # makes new groups.
        options = cast(Any, import_torch_npu())._C._distributed_c10d.ProcessGroupHCCL.Options()
        options._timeout = timeout
        if buffer_mb is not None:
            options.hccl_config = {"hccl_buffer_size": buffer_mb}
        return backend_for(device_type), options
    return None


def supported_precisions(device_type: str) -> tuple[str, ...]:
    """Lightning's names of the precisions that the device computes in. Raises DeviceError for an unknown device."""
    if _known(device_type) == NPU and not npu_has_float64():
        return tuple(precision for precision in _ALL_PRECISIONS if precision != "64-true")
    return _ALL_PRECISIONS


def npu_has_float64() -> bool:
    """Whether the cards are simulated ones that were asked for float64, to compare a run with one process closely.

    On a real card `x.double()` silently gives float32, and hccl reduces no float64.
    """
    return "ASCEND_SIM_LIBRARIES" in os.environ and os.environ.get("ASCEND_SIM_FLOAT64") == "1"


def torch_module(device_type: str) -> RuntimeModule:
    """torch.npu, torch.cuda, or a stand-in that does nothing for the CPU. Raises DeviceError for what is missing."""
    if _known(device_type) == "cpu":
        return _Cpu()
    import torch

    if device_type == NPU:
        import_torch_npu()
    return cast(RuntimeModule, getattr(torch, device_type))


def import_torch_npu() -> ModuleType:
    """Import torch_npu, which registers the npu device with torch.

    Raises DeviceError that tells apart: not installed, made for another torch, CANN missing.
    """
    if not _installed():
        raise DeviceError(
            "torch_npu is not installed. Install it next to this torch with `pip install 'lightning-npu-tp[npu]'`."
        )
    torch_version, npu_version = _version("torch"), _version("torch_npu")
    if npu_version and torch_version.split(".")[:2] != npu_version.split(".")[:2]:
        raise DeviceError(
            f"torch_npu {npu_version} does not fit torch {torch_version}: the first two numbers must be equal. "
            f"Install `torch_npu=={'.'.join(torch_version.split('.')[:2])}.*`."
        )
    try:
        return importlib.import_module("torch_npu")
    except (ImportError, OSError) as error:
        if _missing_cann():
            raise DeviceError(
                f"torch_npu is installed, but CANN is not to be found ({error}). Install CANN, then `{_SET_ENV}`."
            ) from error
        raise DeviceError(
            f"torch_npu {npu_version} cannot be imported with torch {torch_version}: {error}. "
            f"Check that torch_npu, torch and CANN are of one release."
        ) from error


def npu_problem() -> str | None:
    """In one sentence, what keeps this machine from using an NPU; None if nothing does. Never raises."""
    try:
        count = _count_npus()
    except DeviceError as error:
        return str(error)
    except Exception as error:
        # A broken driver shows in whatever way the runtime pleases.
        return f"torch_npu is installed, but asking it for devices failed: {error}."
    if count:
        return None
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    hint = f" (ASCEND_RT_VISIBLE_DEVICES={visible!r})" if visible is not None else ""
    return f"torch_npu and CANN are installed, but they see no NPU{hint}; `npu-smi info` shows what the driver sees."


def idle_npus(device_type: str) -> str | None:
    """In one sentence, that a run on `device_type` leaves Ascend cards unused; None if it does not.

    Looks for the driver's device files only, so that torch_npu stays unimported.
    """
    if device_type != "cpu" or not glob.glob(_DEVICE_FILES):
        return None
    return (
        f"This machine has Ascend devices ({_DEVICE_FILES}), but the run is on the CPU: Lightning's accelerator='auto' "
        f"knows no NPU. Set trainer.accelerator={NPU} to use them."
    )


def npu_is_available() -> bool:
    """Whether at least one NPU can be used. Imports torch_npu if it is installed; never raises."""
    return npu_problem() is None


def npu_device_count() -> int:
    """Number of NPUs that this process may use; 0 where none can be used."""
    return 0 if npu_problem() else _count_npus()


def autoload_problem() -> str | None:
    """Why importing torch or transformers fails here, or None: torch_npu is installed, CANN is not.

    torch loads every installed backend when it is imported, and transformers imports torch_npu whenever
    it is installed, so that not even a CPU run starts. Imports neither torch nor torch_npu.
    """
    if not _installed():
        return None
    missing = _missing_cann()
    if missing is None:
        return None
    first = (
        f"transformers imports torch_npu by itself ({_AUTOLOAD}=0 keeps torch alone from it)"
        if os.environ.get(_AUTOLOAD) == "0"
        else "`import torch` loads torch_npu, and so does transformers"
    )
    return (
        f"torch_npu is installed, but CANN's {missing} cannot be loaded; {first}, and fails. To use the NPU, install "
        f"CANN and `{_SET_ENV}`; to run without it, `pip uninstall torch_npu`."
    )


@contextmanager
def explained_import() -> Iterator[None]:
    """Around `import torch` or `import transformers`: a failure due to torch_npu without CANN becomes a DeviceError."""
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        problem = autoload_problem()
        if problem is None:
            raise
        raise DeviceError(problem) from error


def _known(device_type: str) -> str:
    if device_type not in _BACKENDS:
        raise DeviceError(
            f"device type {device_type!r} is not supported. Set trainer.accelerator to one of {sorted(_BACKENDS)}."
        )
    return device_type


def _count_npus() -> int:
    import_torch_npu()
    import torch

    npu = cast(Any, torch).npu
    return int(npu.device_count()) if npu.is_available() else 0


def _installed() -> bool:
    try:
        return importlib.util.find_spec("torch_npu") is not None
    except ValueError:
        # A module without a spec: put into sys.modules by hand, as a simulator may.
        return True


def _missing_cann() -> str | None:
    """The first CANN library that cannot be loaded, or None."""
    for library in _CANN_LIBRARIES:
        try:
            ctypes.CDLL(library)
        except OSError:
            return library
    return None


def _version(package: str) -> str:
    """The installed version without a local part such as +cpu; "" where there is no metadata."""
    try:
        return importlib.metadata.version(package).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""
