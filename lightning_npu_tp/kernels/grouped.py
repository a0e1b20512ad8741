"""The grouped matmul as an autograd function over three primitives, and what their arguments mean.

One matmul per expert on rows sorted by expert. This file holds no arithmetic: a `GroupedPrimitives`
brings it (`reference.py`, `torch_native.py`, `cpu.py`). What is in rows past the last group is
unspecified in every result: kernels leave them uninitialised. Whoever reads rows back
(`rows.py`) selects, and never multiplies by zero, since 0 * NaN is NaN.

Axes: R rows, E this rank's experts, F output width of a weight, D its input width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class RowGroups:
    """How many rows each expert has; rows are sorted by expert, and further rows may follow.

    counts_E: int64 [E], rows per expert, zeros allowed.
    ends_E:   int32 [E], their running sum: where each expert's rows end.
    """

    counts_E: Tensor
    ends_E: Tensor

    @classmethod
    def of(cls, counts_E: Tensor) -> RowGroups:
        """Groups of these sizes; stays on the device."""
        return cls(counts_E=counts_E, ends_E=counts_E.cumsum(0).to(torch.int32))


@dataclass(frozen=True)
class GroupedPrimitives:
    """Arithmetic of a grouped matmul; no gradient, inputs of one dtype.

    rows_by_weights: (x_RD, weight_EFD, groups) -> [R, F], each row times its expert's weight transposed.
    grads_by_weights: (dy_RF, weight_EFD, groups) -> [R, D], the gradient of the rows.
    grads_by_rows: (dy_RF, x_RD, groups) -> [E, F, D], the gradient of the weights; an expert without
        rows gets zeros.
    """

    rows_by_weights: Callable[[Tensor, Tensor, RowGroups], Tensor]
    grads_by_weights: Callable[[Tensor, Tensor, RowGroups], Tensor]
    grads_by_rows: Callable[[Tensor, Tensor, RowGroups], Tensor]


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x_RD: Tensor, weight_EFD: Tensor, groups: RowGroups, primitives: GroupedPrimitives) -> Tensor:
        ctx.save_for_backward(x_RD, weight_EFD, groups.counts_E, groups.ends_E)
        ctx.primitives = primitives
        return primitives.rows_by_weights(x_RD, weight_EFD, groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @override
    def backward(ctx: Any, dy_RF: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_RD, weight_EFD, counts_E, ends_E = ctx.saved_tensors
        groups, dx, dw = RowGroups(counts_E, ends_E), None, None
        dy_RF = dy_RF.contiguous()
        if ctx.needs_input_grad[0]:
            dx = ctx.primitives.grads_by_weights(dy_RF, weight_EFD, groups)
        if ctx.needs_input_grad[1]:
            dw = ctx.primitives.grads_by_rows(dy_RF, x_RD, groups)
        return dx, dw, None, None


def grouped_matmul(x_RD: Tensor, weight_EFD: Tensor, groups: RowGroups, primitives: GroupedPrimitives) -> Tensor:
    """Multiply each row by its expert's weight: y[r] = weight[expert of r] @ x[r].

    x_RD: local [R, D], rows sorted by expert. weight_EFD: local [E, F, D], same dtype as the rows.
    Returns local [R, F]; rows past the last group are unspecified.
    Gradient: of rows (unspecified past the last group) and of weights (zero for an expert without rows).
    """
    return _GroupedMatmul.apply(x_RD, weight_EFD, groups, primitives)
