"""The seam to fused kernels: which implementation computes what, chosen by device and config.

`select` returns the `Kernels` for a device type; nothing is chosen by what happens to be importable,
and an implementation's module is imported only once it is chosen. Two operations so far:

    grouped_matmul  the three primitives behind `grouped.grouped_matmul`
    expert_mlp      the whole routed expert computation as one function, where a device gains by it;
                    "composed" builds it from grouped matmuls (`moe/experts.py`)

A further implementation is a module of this folder with `PRIMITIVES` or `expert_mlp`, and a line below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.kernels.grouped import ExpertMLP, GroupedPrimitives

_MODULES: Mapping[str, Mapping[str, str]] = {
    "grouped_matmul": {"reference": "reference", "torch_native": "torch_native", "cpu": "cpu"},
    "expert_mlp": {"composed": "", "cpu": "cpu_experts"},
}
_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "cpu": {"grouped_matmul": "cpu", "expert_mlp": "cpu"},
    "cuda": {"grouped_matmul": "torch_native", "expert_mlp": "composed"},
    # Plain operators of static shape run there; to be replaced once kernels/npu.py wraps npu_grouped_matmul.
    "npu": {"grouped_matmul": "reference", "expert_mlp": "composed"},
}


@dataclass(frozen=True)
class Kernels:
    """The chosen implementations.

    grouped:    primitives of the grouped matmul.
    expert_mlp: fused routed experts for the silu activation, or None: compose them.
    names:      operation -> name of the implementation, for reports.
    """

    grouped: GroupedPrimitives
    expert_mlp: ExpertMLP | None
    names: Mapping[str, str]


def select(device_type: str, overrides: Mapping[str, str] | None = None) -> Kernels:
    """The kernels for `device_type` ("cpu", "cuda", "npu").

    overrides: operation -> implementation, e.g. {"grouped_matmul": "reference"}. Overriding the
    grouped matmul alone also leaves the fused `expert_mlp`, which would not use it.

    Raises ConfigError for a device, operation or implementation that does not exist.
    """
    overrides = dict(overrides or {})
    if device_type not in _DEFAULTS:
        raise ConfigError(f"There are no kernels for device type {device_type!r}. Use one of {sorted(_DEFAULTS)}.")
    for operation, name in overrides.items():
        if operation not in _MODULES:
            raise ConfigError(f"kernels.{operation}={name!r} names no operation. Use one of {sorted(_MODULES)}.")
        if name not in _MODULES[operation]:
            raise ConfigError(
                f"kernels.{operation}={name!r} is no implementation of it. Use one of {sorted(_MODULES[operation])}."
            )
    if "grouped_matmul" in overrides:
        overrides.setdefault("expert_mlp", "composed")
    names = {**_DEFAULTS[device_type], **overrides}
    grouped = import_module(f"{__name__}.{_MODULES['grouped_matmul'][names['grouped_matmul']]}").PRIMITIVES
    fused = _MODULES["expert_mlp"][names["expert_mlp"]]
    return Kernels(
        grouped=grouped,
        expert_mlp=import_module(f"{__name__}.{fused}").expert_mlp if fused else None,
        names=names,
    )
