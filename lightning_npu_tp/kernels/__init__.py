"""The seam to fused kernels: which implementation computes what, chosen by device and config.

`select` returns the `Kernels` for a device type; nothing is chosen by what happens to be importable,
and an implementation's module is imported only once it is chosen. The operations:

    grouped_matmul  the three primitives behind `grouped.grouped_matmul`
    expert_mlp      the whole routed expert computation as one function, where a device gains by it;
                    "composed" builds it from grouped matmuls (`moe/experts.py`)
    permute         tokens to rows sorted by expert, and their weighted sum back (`rows.py`)
    swiglu          silu(gate) * up of the routed experts
    rms_norm        of hidden states, latents and heads
    rotary          rotation of queries and keys
    attention       softmax(q k) v, causal or masked
    vocabulary      what is done about ids and labels outside of the vocabulary: an error where a device can raise
                    one without asking the host, else NaN

"reference" is plain PyTorch for each of them. A further implementation is a module of this folder with a
function or object of the name below, and a line in `_MODULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import Tensor

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.kernels import grouped_reference, plain, rows
from lightning_npu_tp.kernels.grouped import GroupedPrimitives
from lightning_npu_tp.kernels.rows import ExpertMLP, RowMoves

# operation -> implementation -> (module of this folder, its name there); no module: nothing to import.
_MODULES: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "grouped_matmul": {
        "reference": ("grouped_reference", "PRIMITIVES"),
        "torch_native": ("torch_native", "PRIMITIVES"),
        "cpu": ("cpu", "PRIMITIVES"),
        "npu": ("npu", "PRIMITIVES"),
    },
    "expert_mlp": {"composed": ("", ""), "cpu": ("cpu_experts", "expert_mlp")},
    "permute": {"reference": ("rows", "MOVES"), "npu": ("npu", "MOVES")},
    "swiglu": {"reference": ("plain", "swiglu"), "npu": ("npu_layers", "swiglu")},
    "rms_norm": {"reference": ("plain", "rms_norm"), "npu": ("npu_layers", "rms_norm")},
    "rotary": {"reference": ("plain", "rotate"), "npu": ("npu_layers", "rotate")},
    "attention": {"reference": ("plain", "attend"), "npu": ("npu_layers", "attend")},
    "vocabulary": {
        "reference": ("plain", "mark_outside"),
        "cpu": ("vocabulary", "raise_outside"),
        "cuda": ("vocabulary", "assert_inside"),
    },
}
_PLAIN = dict.fromkeys(("permute", "swiglu", "rms_norm", "rotary", "attention"), "reference")
_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "cpu": {"grouped_matmul": "cpu", "expert_mlp": "cpu", "vocabulary": "cpu", **_PLAIN},
    "cuda": {"grouped_matmul": "torch_native", "expert_mlp": "composed", "vocabulary": "cuda", **_PLAIN},
    # Its assertion would run on the host's CPU.
    "npu": {
        "grouped_matmul": "npu",
        "expert_mlp": "composed",
        "vocabulary": "reference",
        **dict.fromkeys(_PLAIN, "npu"),
    },
}


@dataclass(frozen=True)
class Kernels:
    """The chosen implementations.

    grouped:    primitives of the grouped matmul.
    expert_mlp: fused routed experts for the silu activation, or None: compose them.
    names:      operation -> name of the implementation, for reports.
    permute:    how tokens become rows and rows tokens.
    swiglu, rms_norm, rotate, attend: see the functions of the same names in `plain.py`.
    guard_ids:  see `plain.mark_outside`.
    """

    grouped: GroupedPrimitives
    expert_mlp: ExpertMLP | None
    names: Mapping[str, str] = field(default_factory=dict)
    permute: RowMoves = rows.MOVES
    swiglu: Callable[[Tensor], Tensor] = plain.swiglu
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = plain.rms_norm
    rotate: Callable[..., Tensor] = plain.rotate
    attend: Callable[..., Tensor] = plain.attend
    guard_ids: Callable[..., Tensor] = plain.mark_outside


# For modules that are built by hand; conversion hands over those of the device.
REFERENCE = Kernels(grouped=grouped_reference.PRIMITIVES, expert_mlp=None)


def select(device_type: str, overrides: Mapping[str, str | None] | None = None) -> Kernels:
    """The kernels for `device_type` ("cpu", "cuda", "npu").

    overrides: operation -> implementation, e.g. {"grouped_matmul": "reference"}; None is the device's own.
        Overriding a part of the experts (grouped matmul, permute or swiglu) also leaves the fused
        `expert_mlp`, which would not use it.

    Raises ConfigError for a device, operation or implementation that does not exist.
    """
    chosen = {operation: name for operation, name in (overrides or {}).items() if name is not None}
    if device_type not in _DEFAULTS:
        raise ConfigError(f"There are no kernels for device type {device_type!r}. Use one of {sorted(_DEFAULTS)}.")
    for operation in overrides or {}:
        if operation not in _MODULES:
            raise ConfigError(f"kernels.{operation} names no operation. Use one of {sorted(_MODULES)}.")
    for operation, name in chosen.items():
        if name not in _MODULES[operation]:
            raise ConfigError(
                f"kernels.{operation}={name!r} is no implementation of it. Use one of {sorted(_MODULES[operation])}."
            )
        if name == "npu" != device_type:
            raise ConfigError(
                f"kernels.{operation}={name!r} runs on {name} only, and this run is on {device_type}. "
                f"Set kernels.{operation} to null or 'reference'."
            )
    if {"grouped_matmul", "permute", "swiglu"} & chosen.keys():
        chosen.setdefault("expert_mlp", "composed")
    names = {**_DEFAULTS[device_type], **chosen}
    found = {operation: _load(*_MODULES[operation][name]) for operation, name in names.items()}
    return Kernels(
        grouped=found["grouped_matmul"],
        expert_mlp=found["expert_mlp"],
        names=names,
        permute=found["permute"],
        swiglu=found["swiglu"],
        rms_norm=found["rms_norm"],
        rotate=found["rotary"],
        attend=found["attention"],
        guard_ids=found["vocabulary"],
    )


def _load(module: str, name: str) -> Any:
    return getattr(import_module(f"{__name__}.{module}"), name) if module else None
