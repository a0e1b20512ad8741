"""The grouped matmul on the CPU: one `torch.mm` per expert, straight into its slice of the result.

PyTorch's own grouped matmul loses half of the matmul's rate here in the weight gradient (three
quarters in float32). Reading the counts on the host costs nothing on a CPU, so experts without
rows are skipped. For activations other than silu; `cpu_experts.py` fuses the rest for silu.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_npu_tp.kernels import pages
from lightning_npu_tp.kernels.grouped import GroupedPrimitives, RowGroups


def spans(counts_E: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (expert, first row, row after the last) of every expert, those without rows included."""
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        yield expert, start, start + count
        start += count


def rows_by_weights(x_RD: Tensor, weight_EFD: Tensor, groups: RowGroups) -> Tensor:
    """See GroupedPrimitives."""
    y_RF = pages.empty(x_RD.shape[0], weight_EFD.shape[1], dtype=x_RD.dtype)
    for expert, start, stop in spans(groups.counts_E):
        if stop > start:
            torch.mm(x_RD[start:stop], weight_EFD[expert].t(), out=y_RF[start:stop])
    return y_RF


def grads_by_weights(dy_RF: Tensor, weight_EFD: Tensor, groups: RowGroups) -> Tensor:
    """See GroupedPrimitives."""
    return rows_by_weights(dy_RF, weight_EFD.transpose(1, 2), groups)


def grads_by_rows(dy_RF: Tensor, x_RD: Tensor, groups: RowGroups) -> Tensor:
    """See GroupedPrimitives."""
    dw_EFD = pages.empty(len(groups.counts_E), dy_RF.shape[1], x_RD.shape[1], dtype=dy_RF.dtype)
    for expert, start, stop in spans(groups.counts_E):
        if stop > start:
            torch.mm(dy_RF[start:stop].t(), x_RD[start:stop], out=dw_EFD[expert])
        else:
            dw_EFD[expert].zero_()
    return dw_EFD


PRIMITIVES = GroupedPrimitives(rows_by_weights, grads_by_weights, grads_by_rows)
