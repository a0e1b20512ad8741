"""Linear layer, gated MLP and RMS norm on a rank's own part of the parameters.

Parameters keep transformers' names and are DTensors after conversion; the arithmetic here uses the
local tensor, so no operator pays for DTensor dispatch. `ShardedLinear` does not communicate;
`ShardedMLP` does unless its owner reduces several partial sums at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_npu_tp.collectives import copy_to_group, group_size, reduce_from_group
from lightning_npu_tp.layout import Groups


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter, differentiable; a plain tensor is its own part."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class ShardedLinear(nn.Module):
    """y = x W^T + b with this rank's rows or columns of W.

    weight: global [out, in] as DTensor, local [out / t, in] (columns) or [out, in / t] (rows).
    A row-split layer leaves its bias to the owner, who adds it after the reduction.
    """

    def __init__(self, source: nn.Linear, *, skip_bias: bool = False) -> None:
        super().__init__()
        self.weight = source.weight
        self.bias = source.bias
        self.skip_bias = skip_bias

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in local]; returns [..., out local]."""
        bias = None if self.bias is None or self.skip_bias else local(self.bias)
        return F.linear(x, local(self.weight), bias)


class ShardedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up split by columns, down by rows.

    partial=True: input is already copied to the group and the output is this rank's partial sum,
    for an owner (the MoE block) that reduces it together with others.
    """

    def __init__(self, source: Any, groups: Groups, *, partial: bool = False) -> None:
        super().__init__()
        self.gate_proj = ShardedLinear(source.gate_proj)
        self.up_proj = ShardedLinear(source.up_proj)
        self.down_proj = ShardedLinear(source.down_proj, skip_bias=True)
        self.act_fn: Callable[[Tensor], Tensor] = source.act_fn
        self.groups = groups
        self.partial = partial

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] replicated; returns [..., D], replicated or partial."""
        group = self.groups.tensor()
        if not self.partial:
            x = copy_to_group(x, group=group)
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        bias = self.down_proj.bias
        if self.partial:
            # Each rank adds its share of the bias, so that the owner's sum holds it once; the copy
            # makes the gradient of the replicated bias complete again.
            return y if bias is None else y + copy_to_group(local(bias), group=group) / group_size(group)
        y = reduce_from_group(y, group)
        return y if bias is None else y + local(bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, normalised in at least float32 as transformers does."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D]; returns the same shape in the dtype that weight * x has."""
        weight = local(self.weight)
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.rms_norm(x.to(wide), (x.shape[-1],), eps=self.eps)
        return weight * normed.to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"
