"""Bytes per rank: pure arithmetic over the plan, no device and no weights needed.

Counts what stays for the whole run: parameters, gradients and optimizer states. Activations and
communication buffers come on top; they depend on batch and length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from lightning_npu_tp.data_parallel import DataParallel
from lightning_npu_tp.layout import Layout
from lightning_npu_tp.plan import Rule, chunk_bounds


@dataclass(frozen=True)
class RankMemory:
    """What one rank holds. Counts are elements, the rest bytes."""

    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        """Parameters, gradients and optimizer states together."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes


def rank_memory(
    shapes: Mapping[str, tuple[int, ...]],
    rules: Mapping[str, Rule],
    layout: Layout,
    *,
    rank: int = 0,
    bytes_per_element: int = 4,
    optimizer_states: int = 2,
    data_parallel: DataParallel = "shard",
) -> RankMemory:
    """Memory of `rank` of `layout` for parameters of these global shapes.

    bytes_per_element: of parameters, gradients and optimizer states (4 for 32-true and the mixed
    precisions, 2 for bf16-true). optimizer_states: tensors per parameter, 2 for AdamW.
    data_parallel: "shard" divides everything over the data ranks too, experts over their replicas.
    """
    elements = 0
    for name, shape in shapes.items():
        rule = rules[name]
        ranks = layout.expert if rule.axis == "expert" else layout.tensor
        own = rule.local_shape(shape, rank % ranks, ranks)
        if data_parallel == "shard":
            replicas = layout.world // ranks
            # As `parallelize_over_data` does: experts by their width where there are fewer of them than replicas.
            dim = 1 if rule.axis == "expert" and own[0] < replicas else 0
            start, stop = chunk_bounds(own[dim], rank // ranks, replicas)
            own = (*own[:dim], stop - start, *own[dim + 1 :])
        elements += prod(own)
    size = elements * bytes_per_element
    return RankMemory(
        parameters=elements, parameter_bytes=size, gradient_bytes=size, optimizer_bytes=size * optimizer_states
    )
