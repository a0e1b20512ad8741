"""Routed experts on Ascend: npu_grouped_matmul, npu_moe_token_permute and npu_moe_token_unpermute.

torch_npu has no gradient for the grouped matmul; `grouped.py` is its autograd function, and the three products
are here. What the operators leave uninitialised (rows past the last group, the weight gradient of an
expert without rows) is cut off here or never read. Importing this file imports no torch_npu: the operators
are looked up when they are called, and the accelerator has imported it by then.
Source: torch_npu/_op_plugin_docs.py of 2.13.0.

Axes: T tokens, K picks, N = T*K picks, R rows, E this rank's experts, D and F widths.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_npu_tp.kernels import grouped_reference
from lightning_npu_tp.kernels.grouped import GroupedPrimitives, RowGroups
from lightning_npu_tp.kernels.npu_limits import common_limits, fits
from lightning_npu_tp.kernels.rows import MOVES as REFERENCE_MOVES
from lightning_npu_tp.kernels.rows import PickRows, RowMoves

_MAX_GROUPS = 1024
_INNER_LIMIT = 65536
_MAX_PICKS = 512
_MAX_INDICES = 16777215

_ROWS, _SUMMED = 0, 2  # group_type: which axis the groups divide


def _grouped_limits(rows: Tensor, other: Tensor, groups: RowGroups) -> Iterable[tuple[bool, str]]:
    yield from common_limits(rows, other)
    num_groups = len(groups.counts_E)
    yield num_groups <= _MAX_GROUPS, f"{num_groups} experts on a rank; npu_grouped_matmul takes {_MAX_GROUPS}"
    widths = (*rows.shape[1:], *other.shape[1:])
    yield max(widths) < _INNER_LIMIT, f"width {max(widths)}; npu_grouped_matmul takes less than {_INNER_LIMIT}"


def _grouped(x: Tensor, weight: Tensor, groups: RowGroups, group_type: int) -> Tensor:
    # A list of counts must have two entries or more; the running sum of one is the count itself.
    has_counts = len(groups.counts_E) > 1
    (y,) = torch.ops.npu.npu_grouped_matmul(
        [x],
        [weight],
        group_list=groups.counts_E,
        split_item=3,
        group_type=group_type,
        group_list_type=int(has_counts),
    )
    return y


def rows_by_weights(x_RD: Tensor, weight_EFD: Tensor, groups: RowGroups) -> Tensor:
    """See GroupedPrimitives."""
    if not fits("grouped_matmul", _grouped_limits(x_RD, weight_EFD, groups)):
        return grouped_reference.rows_by_weights(x_RD, weight_EFD, groups)
    return _grouped(x_RD.contiguous(), weight_EFD.transpose(1, 2), groups, _ROWS)


def grads_by_weights(dy_RF: Tensor, weight_EFD: Tensor, groups: RowGroups) -> Tensor:
    """See GroupedPrimitives."""
    if not fits("grouped_matmul", _grouped_limits(dy_RF, weight_EFD, groups)):
        return grouped_reference.grads_by_weights(dy_RF, weight_EFD, groups)
    return _grouped(dy_RF.contiguous(), weight_EFD, groups, _ROWS)


def grads_by_rows(dy_RF: Tensor, x_RD: Tensor, groups: RowGroups) -> Tensor:
    """See GroupedPrimitives."""
    if not fits("grouped_matmul", _grouped_limits(dy_RF, x_RD, groups)):
        return grouped_reference.grads_by_rows(dy_RF, x_RD, groups)
    dw_EFD = _grouped(dy_RF.contiguous().t(), x_RD.contiguous(), groups, _SUMMED)
    # Nothing says that a product over no rows is written at all.
    return dw_EFD.masked_fill_((groups.counts_E == 0)[:, None, None], 0)


PRIMITIVES = GroupedPrimitives(rows_by_weights, grads_by_weights, grads_by_rows)


def _past_the_last(rows_RD: Tensor, rows: PickRows) -> Tensor:
    """Bool [R, 1], true for rows that hold other ranks' picks."""
    row_R = torch.arange(len(rows_RD), device=rows_RD.device)
    return (row_R >= rows.groups.ends_E[-1])[:, None]


class _ClearGradient(torch.autograd.Function):
    """The identity, whose gradient is zero where the mask is true."""

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return x.view_as(x)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return grad.masked_fill(mask, 0), None


def _permute_limits(tokens: Tensor, rows: PickRows) -> Iterable[tuple[bool, str]]:
    yield from common_limits(tokens)
    num_picks = rows.key_TK.shape[1]
    yield num_picks <= _MAX_PICKS, f"{num_picks} experts per token; npu_moe_token_permute takes {_MAX_PICKS}"
    indices = rows.key_TK.numel()
    yield indices < _MAX_INDICES, f"{indices} picks; npu_moe_token_permute takes less than {_MAX_INDICES}"
    # The way back is documented for as many rows as picks.
    yield rows.num_rows == indices, "fewer experts on a rank than picks per token"


def tokens_to_rows(x_TD: Tensor, rows: PickRows) -> Tensor:
    """See `rows.tokens_to_rows`. The operator sorts as well, so that nothing else has to."""
    if not fits("permute", _permute_limits(x_TD, rows)):
        return REFERENCE_MOVES.tokens_to_rows(x_TD, rows)
    rows_RD, sorted_N = torch.ops.npu.npu_moe_token_permute(x_TD, rows.key_TK, rows.num_rows)
    rows.learn(sorted_N)
    return _ClearGradient.apply(rows_RD, _past_the_last(rows_RD, rows))


def rows_to_tokens(y_RD: Tensor, weights_TK: Tensor, rows: PickRows) -> Tensor:
    """See `rows.rows_to_tokens`. Weights are rounded to the dtype of the rows."""
    if not fits("permute", _permute_limits(y_RD, rows)):
        return REFERENCE_MOVES.rows_to_tokens(y_RD, weights_TK, rows)
    y_RD = y_RD.masked_fill(_past_the_last(y_RD, rows), 0)
    # Weights of float32 with rows of bfloat16 would have NaN for gradients.
    y_TD = torch.ops.npu.npu_moe_token_unpermute(y_RD, rows.sorted_N.to(torch.int32), weights_TK.to(y_RD.dtype))
    return y_TD.to(torch.promote_types(y_RD.dtype, torch.float32))


MOVES = RowMoves(tokens_to_rows, rows_to_tokens)
