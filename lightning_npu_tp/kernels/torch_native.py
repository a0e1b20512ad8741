"""PyTorch's own grouped matmul, for CUDA: static shapes, counts stay on the device.

bfloat16 on compute capability 9 and above runs one kernel per call; for other dtypes and older cards
PyTorch loops inside the operator and reads the ends on the host. What it refuses, float64 and a buffer
of no rows, takes the reference. Widths must be multiples of 16 bytes. Works on the CPU too, slowly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_npu_tp.kernels import grouped_reference
from lightning_npu_tp.kernels.grouped import GroupedPrimitives, RowGroups


def _is_refused(rows: Tensor) -> bool:
    return rows.dtype == torch.float64 or rows.shape[0] == 0


def rows_by_weights(x_RD: Tensor, weight_EFD: Tensor, groups: RowGroups) -> Tensor:
    """See GroupedPrimitives."""
    if _is_refused(x_RD):
        return grouped_reference.rows_by_weights(x_RD, weight_EFD, groups)
    return torch.nn.functional.grouped_mm(x_RD, weight_EFD.transpose(1, 2), offs=groups.ends_E)


def grads_by_weights(dy_RF: Tensor, weight_EFD: Tensor, groups: RowGroups) -> Tensor:
    """See GroupedPrimitives."""
    if _is_refused(dy_RF):
        return grouped_reference.grads_by_weights(dy_RF, weight_EFD, groups)
    return torch.nn.functional.grouped_mm(dy_RF, weight_EFD, offs=groups.ends_E)


def grads_by_rows(dy_RF: Tensor, x_RD: Tensor, groups: RowGroups) -> Tensor:
    """See GroupedPrimitives."""
    if _is_refused(dy_RF):
        return grouped_reference.grads_by_rows(dy_RF, x_RD, groups)
    dw_EFD = torch.nn.functional.grouped_mm(dy_RF.t(), x_RD, offs=groups.ends_E)
    # On Blackwell an expert without rows gets whatever the buffer held (pytorch issue 172439).
    return dw_EFD.masked_fill_((groups.counts_E == 0)[:, None, None], 0)


PRIMITIVES = GroupedPrimitives(rows_by_weights, grads_by_weights, grads_by_rows)
