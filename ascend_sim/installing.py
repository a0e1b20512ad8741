"""Puts the simulated card under this process and its children.

Settings travel in the environment, which is all that children, torchrun and a launcher hand on: where the libraries
are, how many devices there are, and a folder on PYTHONPATH whose sitecustomize hooks the import of torch_npu.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ascend_sim import build, faults, hook, report

SITE = Path(__file__).resolve().parent / "site"
# Argument of install -> variable, default.
SETTINGS: dict[str, tuple[str, str]] = {
    "devices": ("ASCEND_SIM_DEVICES", "4"),
    "memory_gib": ("ASCEND_SIM_MEMORY_GIB", "64"),
    "soc": ("ASCEND_SIM_SOC", "Ascend910B3"),
    "cann": ("ASCEND_SIM_CANN", "8.5.0"),
    "check_streams": ("ASCEND_SIM_CHECK_STREAMS", "1"),
    "delay_us": ("ASCEND_SIM_DELAY_US", "0"),
    "float64": ("ASCEND_SIM_FLOAT64", "0"),
}
MOST_DEVICES = 16
# From these on torch_npu lets HCCL reduce float64; the name is one that the wheel knows.
_SOCS_WITH_FLOAT64, _SOC_FOR_FLOAT64 = "Ascend950", "Ascend950PR_9599"


class SimulatorError(RuntimeError):
    """The simulated card cannot be installed, or not as asked; the text says why and what to do."""


def installed() -> bool:
    """Whether this process has the simulated card, by install or by inheritance."""
    return hook.LIBRARIES in os.environ


def install(
    devices: int | None = None,
    memory_gib: float | None = None,
    soc: str | None = None,
    *,
    cann: str | None = None,
    check_streams: bool | None = None,
    delay_us: int | None = None,
    float64: bool | None = None,
) -> None:
    """Put simulated Ascend devices under this process and those that it starts; before torch_npu is imported.

    devices:       how many this machine has, 1 to 16. Default 4, as is what else is left out, or what was inherited.
    memory_gib:    of each device, in GiB. Default 64.
    soc:           name of the chip, which decides what torch_npu does. Default "Ascend910B3".
    cann:          version of CANN that torch_npu is told. Default "8.5.0".
    check_streams: raise where two streams, or a stream and the host, touch the same bytes unordered. Default True.
    delay_us:      how late queued copies and collectives run, in microseconds. Default 0.
    float64:       cast to float64 and compute in it, fused kernels too, as no card does: rounding then no longer hides
                   a difference from one process. Default False. True makes the chip an Ascend950, the first for which
                   torch_npu lets HCCL reduce float64.

    The first call on a machine builds the libraries (a minute). A second call with the same arguments does nothing.
    Raises SimulatorError when torch_npu is already there or other arguments are in force; BuildError when the
    libraries cannot be built.
    """
    asked = {
        "devices": devices,
        "memory_gib": memory_gib,
        "soc": soc,
        "cann": cann,
        "check_streams": check_streams,
        "delay_us": delay_us,
        "float64": float64,
    }
    wanted = {name: _text(value) for name, value in asked.items() if value is not None}
    _check(devices, memory_gib)
    if installed():
        _refuse_other(wanted)
    elif "torch_npu" in sys.modules:
        raise SimulatorError(
            "torch_npu is already imported, and a card cannot be put under it any more. Call ascend_sim.install() "
            "before anything imports torch_npu (transformers does, where it is installed), or start the program with "
            "`python -m ascend_sim run`."
        )
    else:
        settings = _settings(wanted)
        folder = build.libraries()
        os.environ.update(settings)
        os.environ[hook.LIBRARIES] = str(folder)
        _prepend("LD_LIBRARY_PATH", str(folder))
        _prepend("PYTHONPATH", str(SITE))
    hook.install()
    hook.load_runtime()


def after_torch_npu() -> None:
    """Give torch_npu its kernels; the import hook calls it when torch_npu is there."""
    import torch

    torch.ops.load_library(os.path.join(os.environ[hook.LIBRARIES], "libascend_sim_operators.so"))
    torch.ops.ascend_sim.install(os.environ.get(SETTINGS["float64"][0]) == "1")
    from ascend_sim import operators

    operators.register()
    faults.check_environment()
    report.start()


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check(devices: int | None, memory_gib: float | None) -> None:
    if devices is not None and not 1 <= devices <= MOST_DEVICES:
        raise SimulatorError(f"devices={devices} cannot be simulated: choose 1 to {MOST_DEVICES}.")
    if memory_gib is not None and not 0 < memory_gib <= 1024:
        raise SimulatorError(f"memory_gib={memory_gib} cannot be simulated: choose more than 0 and at most 1024.")


def _settings(wanted: dict[str, str]) -> dict[str, str]:
    """The variables: what is wanted, else what the environment says, else the defaults, which float64 changes."""
    given = {name: wanted.get(name) or os.environ.get(variable) for name, (variable, _) in SETTINGS.items()}
    if given["float64"] == "1":
        soc = given["soc"] = given["soc"] or _SOC_FOR_FLOAT64
        _check_float64(soc)
    return {variable: given[name] or default for name, (variable, default) in SETTINGS.items()}


def _check_float64(soc: str) -> None:
    if not soc.startswith(_SOCS_WITH_FLOAT64):
        raise SimulatorError(
            f"float64 cannot be simulated with soc={soc}: there torch_npu refuses float64 collectives. Leave soc "
            f"out, or choose one of the {_SOCS_WITH_FLOAT64}, such as {_SOC_FOR_FLOAT64}."
        )


def _refuse_other(wanted: dict[str, str]) -> None:
    for name, value in wanted.items():
        variable, default = SETTINGS[name]
        inherited = os.environ.get(variable, default)
        if inherited != value:
            raise SimulatorError(
                f"The simulated card is already installed with {name}={inherited}, and this call asks for "
                f"{name}={value}. One process has one card: use the same arguments, or leave them out."
            )


def _prepend(variable: str, folder: str) -> None:
    before = os.environ.get(variable)
    os.environ[variable] = f"{folder}{os.pathsep}{before}" if before else folder
