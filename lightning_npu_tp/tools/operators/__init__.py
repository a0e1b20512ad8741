"""What torch_npu does with each operator of torch: the table made from its wheel, and how it is made.

`torch_npu_2.13.txt` is written by `scripts/make_operator_table.py` and never by hand; what a wheel does not say
(dynamic shapes, host syncs, dtypes that a kernel refuses) is in `limits.py`. Nothing here imports torch_npu:
which operators it has kernels for stands in a file of the wheel, and torch's own dispatcher knows the rest.

native    torch_npu has a kernel
custom    torch_npu's own operator, with a kernel
implicit  torch builds it from others before any device is asked
explicit  torch builds it from others; they go to the device one by one
fallback  torch_npu copies the arguments to the CPU, computes there and copies back
neither   no kernel and none on the CPU to fall to: a call raises
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch

CLASSES = ("native", "custom", "implicit", "explicit", "fallback", "neither")
TABLE = "torch_npu_2.13.txt"
_WIDTH = 118


@dataclass(frozen=True)
class OperatorTable:
    """Operators by class.

    torch, torch_npu: versions that it was made from.
    classes:  full name ("aten::sort.stable") -> one of CLASSES.
    """

    torch: str
    torch_npu: str
    classes: Mapping[str, str]

    def of(self, operator: str) -> str:
        """Class of an operator by its full name; asks torch's dispatcher for one that is not in the table.

        Those are operators of a newer torch, of another library or of the user's own.
        """
        return self.classes.get(operator) or classify(operator, ())

    def as_text(self) -> str:
        """The table as the text of its file, which `parse` reads back."""
        lines = [
            "# Operators of torch and what torch_npu does with them. Written by scripts/make_operator_table.py.",
            f"torch {self.torch}",
            f"torch_npu {self.torch_npu}",
        ]
        for kind in CLASSES:
            names = sorted(name.removeprefix("aten::") for name, found in self.classes.items() if found == kind)
            lines += ["", f"[{kind} {len(names)}]", textwrap.fill(" ".join(names), _WIDTH, break_on_hyphens=False)]
        return "\n".join(lines) + "\n"


def parse(text: str) -> OperatorTable:
    """The table that the text of a file holds."""
    versions: dict[str, str] = {}
    classes: dict[str, str] = {}
    kind = ""
    for line in text.splitlines():
        if line.startswith("["):
            kind = line[1:].split()[0]
        elif kind:
            classes |= {name if "::" in name else f"aten::{name}": kind for name in line.split()}
        elif line and not line.startswith("#"):
            name, version = line.split()
            versions[name] = version
    return OperatorTable(versions["torch"], versions["torch_npu"], classes)


@cache
def operator_table() -> OperatorTable:
    """The table of the torch_npu release that the package was tested with."""
    return parse(files(__name__).joinpath(TABLE).read_text(encoding="utf-8"))


def classify(operator: str, native: Collection[str], delegates: Mapping[str, str] | None = None) -> str:
    """Class of an operator on a device that has kernels for `native` and falls back to the CPU for the rest.

    delegates: operator -> the one that torch's generated code calls for it on a device without a kernel; from torch's
        own native_functions.yaml (`structured_delegate`).
    """
    if operator in native:
        return "native"
    if not operator.startswith("aten::") and _has(operator, "PrivateUse1"):
        # Registered by the library that brought the operator.
        return "native"
    if _has(operator, "CompositeImplicitAutograd"):
        return "implicit"
    delegate = (delegates or {}).get(operator)
    if delegate is not None:
        # lgamma has no kernel of its own kind anywhere: it allocates and calls lgamma.out.
        return "fallback" if classify(delegate, native) == "fallback" else "explicit"
    if _has(operator, "CompositeExplicitAutograd") or _has(operator, "CompositeExplicitAutogradNonFunctional"):
        return "explicit"
    return "fallback" if _has(operator, "CPU") else "neither"


def _has(operator: str, key: str) -> bool:
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)
    except RuntimeError:
        # Gone again, or of a library that is not loaded.
        return False
