"""What a proof says: the differences that were found, row by row, and the verdict over them.

Filled by `prove.py`, printed by the command line. Numbers and words only: nothing is run or compared here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.parallel.layout import Layout, resolve_dispatch


@dataclass(frozen=True)
class Worst:
    """The largest relative difference of several numbers, and in which of them it is."""

    difference: float = 0.0
    where: str = ""

    def __or__(self, other: Worst) -> Worst:
        return other if other.difference > self.difference or not self.where else self


@dataclass
class Check:
    """One row of the proof.

    name:     "loss", "logits", "clip norm", "expert counts", a kind of batch, or the pattern of a sharding rule.
    split:    how the rule splits; of a kind of batch its sequences x positions; "" for the others.
    gradient: worst gradient of the rule's parameters; of a kind of batch its worst number, an infinite one where
              the path that it is there for was never taken; for the others the number itself.
    after:    worst parameter of the rule after the last step; None for the others.
    """

    name: str
    split: str = ""
    gradient: Worst = field(default_factory=Worst)
    after: Worst | None = None

    @property
    def worst(self) -> Worst:
        """The worse of `gradient` and `after`."""
        return self.gradient | self.after if self.after is not None else self.gradient

    def passed(self, bound: float) -> bool:
        """Whether all differences of this row are within the bound."""
        return self.worst.difference <= bound


@dataclass
class Proof:
    """What was compared and how far it was off.

    config:       of the small model.
    left_out:     how many collectives a broken rule was spared, on all ranks.
    not_compared: what the model does in training and no row is about, each with the reason.
    """

    family: str
    layout: Layout
    options: Options
    config: Any
    bound: float
    dtype: str
    device: str
    steps: int
    checks: list[Check]
    left_out: int = 0
    not_compared: Sequence[str] = ()

    @property
    def failed(self) -> list[Check]:
        """The checks with a difference beyond the bound."""
        return [check for check in self.checks if not check.passed(self.bound)]

    @property
    def worst(self) -> Worst:
        """The largest relative difference of all checks."""
        worst = Worst()
        for check in self.checks:
            worst |= check.worst
        return worst

    def headline(self) -> str:
        """The verdict over all rows in one line, with the worst difference."""
        worst = f"worst {self.worst.difference:.1e}, bound {self.bound:.0e}"
        if not self.failed:
            return f"any number: {worst}: the layout computes what one process computes"
        return (
            f"{len(self.failed)} of {len(self.checks)} checks fail, {worst} ({self.worst.where}): "
            f"the layout does not compute what one process computes"
        )

    def as_json(self) -> dict[str, Any]:
        """The proof as plain data; numbers that are not finite are texts."""
        sizes = self.layout
        return {
            "family": self.family,
            "layout": {"data": sizes.data, "tensor": sizes.tensor, "expert": sizes.expert},
            "sequence_parallel": self.options.sequence_parallel,
            "dispatch": resolve_dispatch(sizes, self.options.dispatch),
            "recompute": self.options.recompute,
            "data_parallel": self.options.data_parallel,
            "dtype": self.dtype,
            "device": self.device,
            "steps": self.steps,
            "bound": self.bound,
            "passed": not self.failed,
            "headline": self.headline(),
            "not_compared": list(self.not_compared),
            "checks": [_check_as_json(check, self.bound) for check in self.checks],
        }


def _check_as_json(check: Check, bound: float) -> dict[str, Any]:
    def plain(worst: Worst) -> dict[str, Any]:
        value = worst.difference
        return {"difference": value if math.isfinite(value) else str(value), "where": worst.where}

    found: dict[str, Any] = {"name": check.name, "split": check.split, "passed": check.passed(bound)}
    if check.after is None:
        return {**found, "value": plain(check.gradient)}
    return {**found, "gradient": plain(check.gradient), "after": plain(check.after)}
