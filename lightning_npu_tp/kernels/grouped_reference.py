"""The grouped matmul written so that one sees it is right: every expert on all rows, selected by a mask.

The oracle for the other implementations, on any device and in any dtype, with static shapes and no
host sync. It costs E times the work of the fast ones. Rows past the last group come out as zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_npu_tp.kernels.grouped import GroupedPrimitives, RowGroups


def _expert_mask(groups: RowGroups, expert: int, num_rows: int) -> Tensor:
    row = torch.arange(num_rows, device=groups.ends_E.device)
    end = groups.ends_E[expert]
    return ((row >= end - groups.counts_E[expert]) & (row < end))[:, None]


def rows_by_weights(x_RD: Tensor, weight_EFD: Tensor, groups: RowGroups) -> Tensor:
    """See GroupedPrimitives."""
    y_RF = x_RD.new_zeros((x_RD.shape[0], weight_EFD.shape[1]))
    for expert, weight_FD in enumerate(weight_EFD):
        y_RF = torch.where(_expert_mask(groups, expert, len(x_RD)), x_RD @ weight_FD.t(), y_RF)
    return y_RF


def grads_by_weights(dy_RF: Tensor, weight_EFD: Tensor, groups: RowGroups) -> Tensor:
    """See GroupedPrimitives."""
    return rows_by_weights(dy_RF, weight_EFD.transpose(1, 2), groups)


def grads_by_rows(dy_RF: Tensor, x_RD: Tensor, groups: RowGroups) -> Tensor:
    """See GroupedPrimitives."""
    dw = []
    for expert in range(len(groups.ends_E)):
        mask = _expert_mask(groups, expert, len(x_RD))
        # Both are masked: zero times an uninitialised NaN would still be NaN.
        dw.append(torch.where(mask, dy_RF, 0).t() @ torch.where(mask, x_RD, 0))
    return torch.stack(dw)


PRIMITIVES = GroupedPrimitives(rows_by_weights, grads_by_weights, grads_by_rows)
