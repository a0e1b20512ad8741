"""Routed experts on the CPU as one autograd function: an expert's rows stay in cache from gather to sum.

On a CPU the matmuls are only as fast as the memory lets them: the permuted copies of the tokens, the
intermediate activations and their gradients, each [R, D] or [R, F], would cost as much as a third
of the arithmetic. So one expert at a time is gathered, multiplied, activated, multiplied and added
to its tokens; only the gate and up projections are kept for the backward, and silu(gate) * up is
computed again. Counts are read on the host, which costs nothing here. silu only.

Axes: T tokens, K picks, R rows, n rows of one expert, D hidden, F expert width, G = 2F, E local experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_npu_tp.kernels import pages
from lightning_npu_tp.kernels.cpu import spans
from lightning_npu_tp.kernels.rows import PickRows


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        order_R: Tensor,
        counts_E: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
    ) -> Tensor:
        dtype, wide = x_TD.dtype, torch.promote_types(x_TD.dtype, torch.float32)
        # Rows past the last local one are cut off here, and nothing below ever sees them.
        order_R = order_R[: sum(counts_E.tolist())]
        token_R = order_R // weights_TK.shape[1]
        weight_R1 = weights_TK.reshape(-1).index_select(0, order_R)[:, None]
        projected_RG = pages.empty(len(order_R), gate_up_EGD.shape[1], dtype=dtype)
        out_TD = torch.zeros(x_TD.shape, dtype=wide)
        for expert, start, stop in spans(counts_E):
            if start == stop:
                continue
            token_n = token_R[start:stop]
            projected_nG = projected_RG[start:stop]
            torch.mm(x_TD.index_select(0, token_n), gate_up_EGD[expert].to(dtype).t(), out=projected_nG)
            gate_nF, up_nF = projected_nG.chunk(2, dim=1)
            y_nD = torch.mm(F.silu(gate_nF).mul_(up_nF), down_EDF[expert].to(dtype).t())
            # One expert has a token at most once, so this addition has one order only.
            out_TD.index_add_(0, token_n, y_nD.to(wide).mul_(weight_R1[start:stop]))
        ctx.save_for_backward(x_TD, weights_TK, order_R, counts_E, projected_RG, gate_up_EGD, down_EDF)
        return out_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
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
        for expert, start, stop in spans(counts_E):
            if start == stop:
                for gradient in (dgate_up, ddown):
                    if gradient is not None:
                        gradient[expert].zero_()
                continue
            token_n, weight_n1 = token_R[start:stop], weight_R1[start:stop]
            gate_nF, up_nF = projected_RG[start:stop].chunk(2, dim=1)
            activated_nF = F.silu(gate_nF)
            hidden_nF = activated_nF * up_nF
            grad_nD = grad_TD.index_select(0, token_n)
            # Without the routing weight yet: then its own gradient is a dot product of what is at hand,
            # and the experts' outputs need not be kept.
            dhidden_nF = torch.mm(grad_nD, down_EDF[expert].to(dtype))
            dweight_R[start:stop] = (dhidden_nF.to(wide) * hidden_nF).sum(1)
            if ddown is not None:
                _product_into(ddown[expert], grad_nD.t(), torch.mul(hidden_nF, weight_n1, out=hidden_nF))
            torch.mul(dhidden_nF, weight_n1, out=dhidden_nF)
            dprojected_nG = torch.empty(stop - start, 2 * gate_nF.shape[1], dtype=dtype)
            dgate_nF, dup_nF = dprojected_nG.chunk(2, dim=1)
            torch.mul(dhidden_nF, activated_nF, out=dup_nF)
            dgate_nF.copy_(torch.ops.aten.silu_backward(dhidden_nF.mul_(up_nF), gate_nF))
            if dgate_up is not None:
                _product_into(dgate_up[expert], dprojected_nG.t(), x_TD.index_select(0, token_n))
            if dx_TD is not None:
                dx_TD.index_add_(0, token_n, torch.mm(dprojected_nG, gate_up_EGD[expert].to(dtype)).to(wide))
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


def _product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Write left @ right to `out`, which is wider than they are when autocast keeps float32 weights."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(torch.mm(left, right))


def expert_mlp(x_TD: Tensor, weights_TK: Tensor, rows: PickRows, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """Routed experts of the local picks, weighted and summed per token.

    x_TD: local [T, D]; its dtype is computed in. weights_TK: [T, K], at least float32.
    gate_up_EGD: local [E, 2F, D]. down_EDF: local [E, D, F]. Weights of another dtype are cast
    expert by expert, so that autocast needs no copy of them all.
    Returns local [T, D] in at least float32: this rank's experts' part.
    Gradient: of tokens, routing weights and both expert weights; zeros for experts without rows.
    """
    return _ExpertMLP.apply(x_TD, weights_TK, rows.order_R, rows.groups.counts_E, gate_up_EGD, down_EDF)
