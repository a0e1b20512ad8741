"""Slices of a sequence over tensor ranks: what enters and leaves a region when norms and residuals see a slice each.

Slices are cut as `torch.chunk` cuts, so a length that the ranks do not divide gives shorter last slices,
empty ones included; on the wire they are filled up. `gather_sequence` and `reduce_to_sequence` are
conjugates, like the pair in collectives.py. Nothing is read on the host.

Axes: B sequences, S positions, s this rank's slice of them, X whatever follows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_npu_tp.parallel.collectives import group_size
from lightning_npu_tp.parallel.plan import chunk_bounds

# torch 2.13 renamed both; 2.11 has the old names only.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather_first_dim(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' tensors of one shape, joined along dim 0 in one buffer. No gradient."""
    joined = tensor.new_empty((dist.get_world_size(group) * tensor.shape[0], *tensor.shape[1:]))
    _all_gather_single(joined, tensor.contiguous(), group=group)
    return joined


def slice_length(length: int, ranks: int) -> int:
    """Positions of a full slice when `length` positions lie on `ranks` ranks; the last slices may be shorter."""
    return -(-length // ranks)


def own_slice(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's slice of dim 1, a view; may be empty."""
    start, stop = chunk_bounds(tensor.shape[1], dist.get_rank(group), dist.get_world_size(group))
    return tensor[:, start:stop]


def _pad_positions(tensor: Tensor, length: int) -> Tensor:
    """`tensor` with dim 1 filled up with zeros to `length`."""
    missing = length - tensor.shape[1]
    if not missing:
        return tensor
    return torch.cat((tensor, tensor.new_zeros((tensor.shape[0], missing, *tensor.shape[2:]))), dim=1)


def join_slices(own: Tensor, length: int, group: dist.ProcessGroup) -> Tensor:
    """The whole sequence from every rank's slice of dim 1. No gradient."""
    ranks = dist.get_world_size(group)
    padded = _pad_positions(own, slice_length(length, ranks))
    if padded.shape[0] == 1:
        # One sequence: joined along its positions as it lies, without a copy.
        return all_gather_first_dim(padded[0], group)[None, :length]
    joined = all_gather_first_dim(padded, group)
    return joined.unflatten(0, (ranks, -1)).transpose(0, 1).flatten(1, 2)[:, :length]


def sum_to_slice(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the group, of which this rank gets its slice of dim 1. No gradient."""
    ranks, length = dist.get_world_size(group), partial.shape[1]
    step = slice_length(length, ranks)
    padded = _pad_positions(partial, ranks * step)
    if padded.shape[0] == 1:
        own = torch.empty_like(padded[:, :step], memory_format=torch.contiguous_format)
        _reduce_scatter_single(own[0], padded[0].contiguous(), group=group)
    else:
        by_rank = padded.unflatten(1, (ranks, step)).transpose(0, 1).contiguous()
        own = torch.empty_like(by_rank[0])
        _reduce_scatter_single(own, by_rank.flatten(0, 1), group=group)
    start, stop = chunk_bounds(length, dist.get_rank(group), ranks)
    return own[:, : stop - start]


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, own: Tensor, length: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return join_slices(own, length, group)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return sum_to_slice(grad, ctx.group), None, None


def gather_sequence(own_BsX: Tensor, length: int, group: dist.ProcessGroup | None) -> Tensor:
    """Enter a region from slices of the sequence: every rank gets all positions for its own part of the work.

    own_BsX: local [B, this rank's slice of S, …]; `length` is S, which the ranks need not divide.
    Returns global [B, S, …], alike on every rank.
    Gradient: each rank's partial gradient is summed, and the rank gets its slice of the sum.
    """
    return own_BsX if group_size(group) == 1 else _GatherSequence.apply(own_BsX, length, group)


class _ReduceToSequence(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.length, ctx.group = partial.shape[1], group
        return sum_to_slice(partial, group)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return join_slices(grad, ctx.length, ctx.group), None


def reduce_to_sequence(partial_BSX: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Leave a region into slices of the sequence: sum the ranks' partial results, keep the own positions.

    partial_BSX: [B, S, …], same shape everywhere. Returns local [B, this rank's slice of S, …].
    Gradient: all positions' gradients, gathered.
    """
    return partial_BSX if group_size(group) == 1 else _ReduceToSequence.apply(partial_BSX, group)


class _SliceSequence(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.length, ctx.group = whole.shape[1], group
        return own_slice(whole, group).clone()

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return join_slices(grad, ctx.length, ctx.group), None


def slice_sequence(whole_BSX: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's slice of what every rank holds whole.

    whole_BSX: [B, S, …], alike on every rank. Returns local [B, this rank's slice of S, …].
    Gradient: gathered, hence whole on every rank.
    """
    return whole_BSX if group_size(group) == 1 else _SliceSequence.apply(whole_BSX, group)
