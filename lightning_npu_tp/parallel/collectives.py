"""Differentiable collectives. The group is always an argument; a group of one communicates nothing.

The two that frame every tensor-parallel region are conjugates: `copy_to_group` enters (identity
forward, all-reduce backward) and `reduce_from_group` leaves (all-reduce forward, identity
backward). Leaving out the first gives a right loss with wrong gradients, so the region's input goes
through it exactly once. `start_exchange` moves rows between expert ranks.

Nothing here reads a tensor on the host: sizes come from shapes or are handed in as Python lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_npu_tp.errors import CountMismatch


def group_size(group: dist.ProcessGroup | None) -> int:
    """Number of ranks of `group`; None stands for a single process."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This process's rank within `group`; None stands for a single process."""
    return 0 if group is None else dist.get_rank(group)


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the group into a new tensor; the input stays as it is. No gradient."""
    total = tensor.contiguous().clone() if tensor.is_contiguous() else tensor.contiguous()
    dist.all_reduce(total, group=group)
    return total


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        ctx.group = group
        outputs = tuple(tensor.view_as(tensor) for tensor in tensors)
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        totals = [None if grad is None else all_reduce_sum(grad, ctx.group) for grad in grads]
        return None, *totals


def copy_to_group(*tensors: Tensor, group: dist.ProcessGroup | None) -> Any:
    """Enter a region whose ranks each use the same `tensors` for their own part of the work.

    tensors: replicated over the group, any shapes. Returns them unchanged (a tuple for several).
    Gradient: each rank's partial gradient is summed over the group, hence complete on every rank.
    """
    if group_size(group) == 1:
        return tensors if len(tensors) > 1 else tensors[0]
    return _CopyToGroup.apply(group, *tensors)


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce_sum(tensor, group)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def reduce_from_group(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Leave a region: sum the ranks' partial results.

    tensor: each rank's partial sum, same shape everywhere. Returns the sum, replicated.
    Gradient: identity, since what follows is computed alike on every rank.
    """
    return tensor if group_size(group) == 1 else _ReduceFromGroup.apply(tensor, group)


class _GatherLastDim(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, tensor: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.rank = sizes, dist.get_rank(group)
        widest = max(sizes)
        # All-gather wants equal shapes; the padding is cut off again below.
        padded = torch.nn.functional.pad(tensor, (0, widest - tensor.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], dim=-1)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        start = sum(ctx.sizes[: ctx.rank])
        return grad[..., start : start + ctx.sizes[ctx.rank]].contiguous(), None, None


def gather_last_dim(tensor: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """Join the ranks' slices of the last dimension.

    tensor: local [..., sizes[rank]]. sizes: every rank's size, zeros allowed.
    Returns global [..., sum(sizes)], replicated.
    Gradient: this rank's slice, since what follows is computed alike on every rank.
    Raises CountMismatch before communicating for sizes that are not the ranks'.
    """
    ranks, rank = group_size(group), group_rank(group)
    if len(sizes) != ranks or sizes[rank] != tensor.shape[-1]:
        raise CountMismatch(
            f"sizes={list(sizes)} must have one entry for each of the {ranks} ranks, and rank {rank}'s must be the "
            f"{tensor.shape[-1]} columns that it holds."
        )
    return tensor if ranks == 1 else _GatherLastDim.apply(tensor, sizes, group)


class _Transfer:
    """One exchange under way, in the forward or in the backward pass."""

    def __init__(self, send_rows: list[int], recv_rows: list[int], group: dist.ProcessGroup) -> None:
        self.send_rows, self.recv_rows, self.group = send_rows, recv_rows, group
        self._under_way: tuple[Any, Tensor, Tensor] | None = None

    def start(self, rows: Tensor, send: list[int], recv: list[int]) -> Tensor:
        """Begin the exchange; returns the buffer that holds the received rows after `finish`."""
        rows = rows.contiguous()
        received = rows.new_empty((sum(recv), *rows.shape[1:]))
        work = dist.all_to_all_single(received, rows, recv, send, group=self.group, async_op=True)
        # The rows are kept until then: nobody must reuse their memory.
        self._under_way = work, rows, received
        return received

    def finish(self) -> Tensor:
        """Wait for the exchange; the rows received, local [R, …], sorted by source rank."""
        assert self._under_way is not None, "an exchange is waited for once"
        work, _, received = self._under_way
        work.wait()
        self._under_way = None
        return received


class _StartExchange(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, rows: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.start(rows, transfer.send_rows, transfer.recv_rows)

    @staticmethod
    @override
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.finish(), None


class _FinishExchange(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, received: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.finish()
        return received.view_as(received)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # The gradient travels beside the graph: what goes along the edge must have the shape of the rows here,
        # and nobody looks at it.
        ctx.transfer.start(grad, ctx.transfer.recv_rows, ctx.transfer.send_rows)
        return grad, None


@dataclass(frozen=True)
class PendingRows:
    """Rows on their way; other work may be done before `wait`."""

    _rows: Tensor
    _transfer: _Transfer | None

    def wait(self) -> Tensor:
        """Wait for the exchange; the rows received, local [R, …], sorted by source rank. Called once."""
        if self._transfer is None:
            return self._rows
        return _FinishExchange.apply(self._rows, self._transfer)


def start_exchange(
    rows_ND: Tensor, send_rows: Sequence[int], recv_rows: Sequence[int], group: dist.ProcessGroup | None
) -> PendingRows:
    """Begin to send each row to the rank that owns its expert (all-to-all with uneven splits).

    rows_ND:   local [N, ...], sorted by destination rank.
    send_rows: rows per destination, host integers; sums to N, zeros allowed.
    recv_rows: rows per source, host integers; sums to R, zeros allowed.
    The result's `wait` returns local [R, ...], sorted by source rank; never aliases the input.
    Gradient: the same exchange with the two counts swapped; in the backward pass too, what was computed
    between the two calls is computed while rows travel.
    Raises CountMismatch before communicating, so that no peer hangs.
    """
    send, recv, size = list(send_rows), list(recv_rows), group_size(group)
    if len(send) != size or len(recv) != size:
        raise CountMismatch(
            f"send_rows has {len(send)} and recv_rows {len(recv)} entries, but the group has {size} ranks."
        )
    if sum(send) != rows_ND.shape[0] or min(send) < 0 or min(recv) < 0:
        raise CountMismatch(
            f"send_rows={send} (sum {sum(send)}) must be non-negative and add up to the {rows_ND.shape[0]} rows "
            f"given; recv_rows={recv}."
        )
    if size == 1:
        if send != recv:
            raise CountMismatch(f"a group of one receives what it sends, but send_rows={send}, recv_rows={recv}.")
        return PendingRows(rows_ND.clone(), None)
    transfer = _Transfer(send, recv, group)  # type: ignore[arg-type]
    return PendingRows(_StartExchange.apply(rows_ND, transfer), transfer)
