"""Routed experts on the CPU as one autograd function: rows stay in cache from gather to sum.

On a CPU the matmuls are only as fast as the memory lets them: the permuted copies of the tokens, the
intermediate activations and their gradients, each [R, D] or [R, F], would cost as much as a third
of the arithmetic. So a few experts at a time are gathered, multiplied, activated, multiplied and added
to their tokens; only the gate and up projections are kept for the backward, and silu(gate) * up is
computed again. Matmuls are per expert, everything else per chunk of experts: thousands of small
operators would each wait for all threads. Counts are read on the host, which costs nothing here.
silu only.

Axes: T tokens, K picks, R rows, n rows of one chunk, D hidden, F expert width, G = 2F, E local experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_npu_tp.kernels import pages
from lightning_npu_tp.kernels.cpu import spans
from lightning_npu_tp.kernels.rows import PickRows

# Rows of a chunk: at hidden 1024 and width 704 its tensors take 10 MB in bfloat16, 20 in float32.
_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class _Chunk:
    """Consecutive experts; `experts` holds (expert, first row, row after the last), counted within the chunk."""

    rows: slice
    experts: list[tuple[int, int, int]]


def _chunks(counts_E: Tensor) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    first = 0
    experts: list[tuple[int, int, int]] = []
    for expert, start, stop in spans(counts_E):
        if experts and stop - first > _CHUNK_ROWS:
            chunks.append(_Chunk(slice(first, start), experts))
            first, experts = start, []
        experts.append((expert, start - first, stop - first))
    chunks.append(_Chunk(slice(first, stop), experts))
    return chunks


def _rows_by_weights(x_nD: Tensor, weight_EFD: Tensor, chunk: _Chunk, out_nF: Tensor) -> Tensor:
    for expert, start, stop in chunk.experts:
        if stop > start:
            torch.mm(x_nD[start:stop], weight_EFD[expert].to(x_nD.dtype).t(), out=out_nF[start:stop])
    return out_nF


def _grads_by_rows(dy_nF: Tensor, x_nD: Tensor, chunk: _Chunk, out_EFD: Tensor) -> None:
    for expert, start, stop in chunk.experts:
        if start == stop:
            out_EFD[expert].zero_()
        elif out_EFD.dtype == dy_nF.dtype:
            torch.mm(dy_nF[start:stop].t(), x_nD[start:stop], out=out_EFD[expert])
        else:
            # Autocast: float32 weights, and so float32 gradients, of a matmul in fewer bits.
            out_EFD[expert].copy_(torch.mm(dy_nF[start:stop].t(), x_nD[start:stop]))


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        order_R: Tensor,
        counts_E: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
    ) -> Tensor:
        wide, chunks = torch.promote_types(x_TD.dtype, torch.float32), _chunks(counts_E)
        # Rows past the last local one are cut off here, and nothing below ever sees them.
        order_R = order_R[: chunks[-1].rows.stop]
        token_R = order_R // weights_TK.shape[1]
        weight_R1 = weights_TK.reshape(-1).index_select(0, order_R)[:, None]
        projected_RG = pages.empty(len(order_R), gate_up_EGD.shape[1], dtype=x_TD.dtype)
        out_TD = torch.zeros(x_TD.shape, dtype=wide)
        for chunk in chunks:
            token_n, x_nD = token_R[chunk.rows], x_TD.index_select(0, token_R[chunk.rows])
            projected_nG = _rows_by_weights(x_nD, gate_up_EGD, chunk, projected_RG[chunk.rows])
            gate_nF, up_nF = projected_nG.chunk(2, dim=1)
            y_nD = _rows_by_weights(F.silu(gate_nF).mul_(up_nF), down_EDF, chunk, out_nF=x_nD)
            out_TD.index_add_(0, token_n, y_nD.to(wide).mul_(weight_R1[chunk.rows]))
        ctx.save_for_backward(x_TD, weights_TK, order_R, counts_E, projected_RG, gate_up_EGD, down_EDF)
        return out_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    @override
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, order_R, counts_E, projected_RG, gate_up_EGD, down_EDF = ctx.saved_tensors
        dtype, wide = x_TD.dtype, grad_TD.dtype
        grad_TD = grad_TD.to(dtype)
        token_R = order_R // weights_TK.shape[1]
        weight_R1 = weights_TK.reshape(-1).index_select(0, order_R)[:, None]
        dweight_R = torch.empty(len(order_R), dtype=wide)
        dx_TD = torch.zeros(x_TD.shape, dtype=wide) if ctx.needs_input_grad[0] else None
        dgate_up = _gradient_buffer(gate_up_EGD) if ctx.needs_input_grad[4] else None
        ddown = _gradient_buffer(down_EDF) if ctx.needs_input_grad[5] else None
        for chunk in _chunks(counts_E):
            token_n, weight_n1 = token_R[chunk.rows], weight_R1[chunk.rows]
            gate_nF, up_nF = projected_RG[chunk.rows].chunk(2, dim=1)
            activated_nF = F.silu(gate_nF)
            hidden_nF = activated_nF * up_nF
            grad_nD = grad_TD.index_select(0, token_n)
            # Without the routing weight yet: then its own gradient is a dot product of what is at hand,
            # and the experts' outputs need not be kept.
            dhidden_nF = _rows_by_weights(grad_nD, down_EDF.transpose(1, 2), chunk, torch.empty_like(hidden_nF))
            dweight_R[chunk.rows] = (dhidden_nF.to(wide) * hidden_nF).sum(1)
            if ddown is not None:
                _grads_by_rows(grad_nD, torch.mul(hidden_nF, weight_n1, out=hidden_nF), chunk, ddown)
            torch.mul(dhidden_nF, weight_n1, out=dhidden_nF)
            dprojected_nG = torch.empty(len(token_n), gate_up_EGD.shape[1], dtype=dtype)
            dgate_nF, dup_nF = dprojected_nG.chunk(2, dim=1)
            torch.mul(dhidden_nF, activated_nF, out=dup_nF)
            dgate_nF.copy_(torch.ops.aten.silu_backward(dhidden_nF.mul_(up_nF), gate_nF))
            if dgate_up is not None:
                _grads_by_rows(dprojected_nG, x_TD.index_select(0, token_n), chunk, dgate_up)
            if dx_TD is not None:
                dx_nD = _rows_by_weights(dprojected_nG, gate_up_EGD.transpose(1, 2), chunk, out_nF=grad_nD)
                dx_TD.index_add_(0, token_n, dx_nD.to(wide))
        dweights_N = torch.zeros(weights_TK.numel(), dtype=wide).scatter_(0, order_R, dweight_R)
        return (
            None if dx_TD is None else dx_TD.to(dtype),
            dweights_N.view_as(weights_TK).to(weights_TK.dtype),
            None,
            None,
            dgate_up,
            ddown,
        )


def _gradient_buffer(weight: Tensor) -> Tensor:
    return pages.empty(*weight.shape, dtype=weight.dtype)


def expert_mlp(x_TD: Tensor, weights_TK: Tensor, rows: PickRows, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """Routed experts of the local picks, weighted and summed per token.

    x_TD: local [T, D]; its dtype is computed in. weights_TK: [T, K], at least float32.
    gate_up_EGD: local [E, 2F, D]. down_EDF: local [E, D, F]. Weights of another dtype are cast
    expert by expert, so that autocast needs no copy of them all.
    Returns local [T, D] in at least float32: this rank's experts' part.
    Gradient: of tokens, routing weights and both expert weights; zeros for experts without rows.
    """
    return _ExpertMLP.apply(x_TD, weights_TK, rows.order_R, rows.groups.counts_E, gate_up_EGD, down_EDF)
