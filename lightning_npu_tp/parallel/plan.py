"""Sharding rules as data: one table per model family says how each parameter is split, and why.

A plan maps name patterns to rules. Conversion, checkpoint mapping, memory arithmetic and the proof
all read it. Every parameter matches exactly one rule and every rule at least one parameter;
`match_plan` raises otherwise and names them. A rule knows shapes and placements, no communication.

Uneven splits follow `torch.chunk` (and DTensor): all parts ceil(size / ranks) but the last ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from lightning_npu_tp.errors import ConversionError

Axis = Literal["tensor", "expert"]
Init = Literal["normal", "ones", "zeros"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one parameter lies on its mesh axis.

    axis: the mesh axis that the parameter is placed on.
    dim:  the tensor dimension that is split, None for a copy on every rank.
    unit: what must not be cut, for messages: a head, an expert, a vocabulary entry, a channel.
    init: how a parameter without weights starts: normal(0, config.initializer_range), ones, zeros.
    why:  the reason, for readers.
    """

    axis: Axis = "tensor"
    dim: int | None = None
    unit: str = ""
    init: Init = "normal"
    why: str = ""

    @property
    def placement(self) -> Placement:
        """DTensor placement on the rule's axis."""
        return Replicate() if self.dim is None else Shard(self.dim)


def Columns(*, unit: str = "channel", init: Init = "normal", why: str = "") -> Rule:  # noqa: N802
    """Split the output features (dim 0 of weight and bias) over the tensor axis."""
    return Rule(dim=0, unit=unit, init=init, why=why or "each rank computes its own outputs")


def Rows(*, unit: str = "channel", why: str = "") -> Rule:  # noqa: N802
    """Split the input features (dim 1 of a weight) over the tensor axis; outputs are partial sums."""
    return Rule(dim=1, unit=unit, why=why or "takes the outputs of a column split as they lie")


def Vocab(*, why: str = "") -> Rule:  # noqa: N802
    """Split the vocabulary (dim 0) over the tensor axis, unevenly where it does not divide."""
    return Rule(dim=0, unit="vocabulary entry", why=why or "the largest dense matrix; its logits are never gathered")


def Experts(*, why: str = "") -> Rule:  # noqa: N802
    """Give each rank of the expert axis whole experts (dim 0)."""
    return Rule(axis="expert", dim=0, unit="expert", why=why or "slices of one expert would be too thin to be fast")


def Replicated(*, why: str, init: Init = "normal") -> Rule:  # noqa: N802
    """A copy on every rank of the tensor axis; its gradient must come out complete on each."""
    return Rule(why=why, init=init)


Plan = Mapping[str, Rule]


def chunk_bounds(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """First and one-past-last index of `rank`'s part when `size` is chunked over `ranks`."""
    step = -(-size // ranks)
    return min(rank * step, size), min((rank + 1) * step, size)


def match_plan(plan: Plan, names: Iterable[str], *, family: str) -> dict[str, Rule]:
    """Assign each parameter name its one rule.

    Raises ConversionError that names the parameters without a rule or with several, and the rules
    without a parameter.
    """
    matched: dict[str, Rule] = {}
    used: set[str] = set()
    problems: list[str] = []
    for name in names:
        patterns = [pattern for pattern in plan if fnmatchcase(name, pattern)]
        used.update(patterns)
        if len(patterns) == 1:
            matched[name] = plan[patterns[0]]
        elif patterns:
            problems.append(f"{name} matches several rules: {', '.join(patterns)}")
        else:
            problems.append(f"{name} matches no rule")
    problems += [f"the rule {pattern!r} matches no parameter" for pattern in plan if pattern not in used]
    if problems:
        raise ConversionError(
            f"The sharding plan of {family} does not fit the model: {'; '.join(problems)}. "
            f"Every parameter needs exactly one rule; correct the plan of the ModelFamily."
        )
    return matched
