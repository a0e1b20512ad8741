"""Metrics over the data ranks: each sample counted once.

The tensor ranks of one data rank compute the same numbers from the same samples. A sum over all
ranks, Lightning's and torchmetrics' default, would count each sample once per tensor rank.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.parallel.layout import Groups, Layout

_OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}


def reduce_over_data(tensor: Tensor, layout: Layout, group: dist.ProcessGroup, operation: Any) -> Tensor:
    """Combine one tensor per data rank; returns a new tensor, alike on every rank.

    operation: "mean", "sum", "max", "min", "product" or a ReduceOp; None means "mean".
    """
    if isinstance(operation, str):
        name = operation.lower()
    else:
        name = {dist.ReduceOp.SUM: "sum", dist.ReduceOp.MAX: "max", dist.ReduceOp.MIN: "min"}.get(operation, "mean")
    if name not in _OPERATIONS:
        raise ConfigError(f"reduce_op={operation!r} is not known. Use one of {sorted(_OPERATIONS)}.")
    ranks = dist.get_world_size(group)
    result = tensor.detach().clone()
    if ranks > 1:
        dist.all_reduce(result, op=_OPERATIONS[name], group=group)
    if name in ("mean", "avg"):
        # A true mean of whole numbers too: Lightning weighs an epoch's values by a mean of batch sizes.
        result = result / ranks
    return result


class DataSync:
    """`dist_sync_fn` for torchmetrics: gathers one state per data rank instead of one per rank."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def __call__(self, state: Tensor, group: Any = None) -> list[Tensor]:
        """state: any shape; returns the data ranks' states."""
        meshes = self._groups.meshes
        if meshes is None or meshes.layout.data == 1:
            return [state]
        from torchmetrics.utilities.distributed import gather_all_tensors

        return gather_all_tensors(state, group=meshes.data_group)
