"""Moving tokens to rows sorted by expert and back; each direction is the other's gradient.

`sort_picks` decides where every pick (one token, one of its experts) goes; the two functions after it
move data. Shapes depend on T, K and E alone and nothing is read on the host. The sums run over a
token's picks in order, so they are deterministic, unlike the scattering additions that automatic
differentiation of an index would bring.

Axes: T tokens, K picks per token, N = T*K picks, R rows, D hidden, E this rank's experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from lightning_npu_tp.kernels.grouped import RowGroups


@dataclass(frozen=True)
class PickRows:
    """Which pick each row holds, and the way back.

    key_TK:   int64 [T, K], local expert of each pick; the number of local experts for other ranks' picks.
    num_rows: R.
    groups:   rows per local expert.

    The rest follows from them when somebody asks: a device whose kernel sorts by itself need not sort twice.
    """

    key_TK: Tensor
    num_rows: int
    groups: RowGroups

    @cached_property
    def _order_N(self) -> Tensor:
        return torch.argsort(self.key_TK.reshape(-1), stable=True)

    @cached_property
    def order_R(self) -> Tensor:
        """int64 [R], pick number t*K + k of each row; rows past the last local one hold other ranks' picks."""
        return self._order_N[: self.num_rows]

    @cached_property
    def sorted_N(self) -> Tensor:
        """int64 or int32 [N], place of each pick in the order by local expert, others' last; may be past R."""
        order_N = self._order_N
        return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))

    @cached_property
    def position_TK(self) -> Tensor:
        """int64 [T, K], row of each pick; any valid row where `is_local_TK` is false."""
        return torch.where(self.is_local_TK, self.sorted_N.view_as(self.key_TK), 0)

    @cached_property
    def is_local_TK(self) -> Tensor:
        """Bool [T, K], whether the pick's expert is on this rank."""
        return self.key_TK < len(self.groups.counts_E)

    @property
    def token_R(self) -> Tensor:
        """int64 [R], the token of each row."""
        return self.order_R // self.key_TK.shape[1]

    def learn(self, sorted_N: Tensor) -> None:
        """Take over the order of rows that a fused kernel has computed."""
        self.__dict__["sorted_N"] = sorted_N


def sort_picks(experts_TK: Tensor, *, first: int, num_local: int) -> PickRows:
    """Sort picks by local expert, other ranks' picks last; a pick keeps its place among equals.

    experts_TK: int64 [T, K], global expert ids, no token naming an expert twice.
    first, num_local: this rank holds experts first .. first + num_local - 1.
    R = T * min(K, num_local): no rank can get more.
    """
    num_tokens, num_picks = experts_TK.shape
    local_TK = experts_TK - first
    key_TK = torch.where((local_TK >= 0) & (local_TK < num_local), local_TK, num_local)
    key_N = key_TK.reshape(-1)
    counts = torch.zeros(num_local + 1, dtype=torch.int64, device=key_N.device)
    counts.scatter_add_(0, key_N, torch.ones_like(key_N))
    return PickRows(
        key_TK=key_TK, num_rows=num_tokens * min(num_picks, num_local), groups=RowGroups.of(counts[:num_local])
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _sum_of_picks(rows_RD: Tensor, weights_TK: Tensor | None, position_TK: Tensor, is_local_TK: Tensor) -> Tensor:
    """Sum each token's local rows in at least float32; [T, D]."""
    num_tokens, num_picks = position_TK.shape
    total = rows_RD.new_zeros((num_tokens, rows_RD.shape[1]), dtype=_wide(rows_RD.dtype))
    # One pick at a time: [T, K, D] at once would be the largest tensor of the layer, several times over.
    for k in range(num_picks):
        pick = rows_RD.index_select(0, position_TK[:, k])
        if weights_TK is not None:
            pick = pick * weights_TK[:, k : k + 1]
        total += torch.where(is_local_TK[:, k : k + 1], pick, 0)
    return total


class _TokensToRows(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, position_TK: Tensor, is_local_TK: Tensor) -> Tensor:
        ctx.save_for_backward(position_TK, is_local_TK)
        return x_TD.index_select(0, token_R)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @override
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum_of_picks(grad_RD, None, *ctx.saved_tensors).to(grad_RD.dtype), None, None, None


def tokens_to_rows(x_TD: Tensor, rows: PickRows) -> Tensor:
    """Copy each token to the rows of its picks.

    x_TD: local [T, D]. Returns local [R, D] in the same dtype.
    Gradient: sum over each token's local rows, in at least float32; other rows are never read.
    """
    return _TokensToRows.apply(x_TD, rows.token_R, rows.position_TK, rows.is_local_TK)


class _RowsToTokens(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any, y_RD: Tensor, weights_TK: Tensor, order_R: Tensor, position_TK: Tensor, is_local_TK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_RD, weights_TK, order_R, position_TK, is_local_TK)
        return _sum_of_picks(y_RD, weights_TK, position_TK, is_local_TK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @override
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y_RD, weights_TK, order_R, position_TK, is_local_TK = ctx.saved_tensors
        num_picks = position_TK.shape[1]
        weight_R = weights_TK.reshape(-1).index_select(0, order_R)
        dy_RD = (grad_TD.index_select(0, order_R // num_picks) * weight_R[:, None]).to(y_RD.dtype)
        dweights = [(y_RD.index_select(0, position_TK[:, k]) * grad_TD).sum(1) for k in range(num_picks)]
        dweights_TK = torch.where(is_local_TK, torch.stack(dweights, dim=1), 0)
        return dy_RD, dweights_TK.to(weights_TK.dtype), None, None, None


def rows_to_tokens(y_RD: Tensor, weights_TK: Tensor, rows: PickRows) -> Tensor:
    """Sum each token's local rows, weighted.

    y_RD: local [R, D]; rows past the last local one may hold anything, NaN included.
    weights_TK: [T, K], the weights of all picks, in at least float32.
    Returns local [T, D] in at least float32: this rank's experts' part.
    Gradient: of rows and of weights; zero for the weights of other ranks' picks.
    """
    return _RowsToTokens.apply(y_RD, weights_TK, rows.order_R, rows.position_TK, rows.is_local_TK)


@dataclass(frozen=True)
class RowMoves:
    """The two movements, as a device does them: see the functions of the same names."""

    tokens_to_rows: Callable[[Tensor, PickRows], Tensor]
    rows_to_tokens: Callable[[Tensor, Tensor, PickRows], Tensor]


MOVES = RowMoves(tokens_to_rows, rows_to_tokens)


class ExpertMLP(Protocol):
    """Routed experts as one function: gather, gate and up, silu, down, weighted sum of the picks."""

    def __call__(
        self, x_TD: Tensor, weights_TK: Tensor, rows: PickRows, gate_up_EGD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        """Return [T, D] in at least float32; computes in the dtype of `x_TD`, whatever the weights' dtype."""
        ...
