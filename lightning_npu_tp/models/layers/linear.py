"""Linear layer, gated MLP and RMS norm on a rank's own part of the parameters.

Parameters keep transformers' names and are DTensors after conversion; the arithmetic here uses the
local tensor, so no operator pays for DTensor dispatch. `ShardedLinear` does not communicate;
`ShardedMLP` does unless its owner reduces several partial sums at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_npu_tp.kernels import REFERENCE, Kernels
from lightning_npu_tp.parallel.collectives import group_size
from lightning_npu_tp.parallel.forward_pass import ForwardPass
from lightning_npu_tp.parallel.tensor_region import Region, tensor_part


class ShardedLinear(nn.Module):
    """y = x W^T + b with this rank's rows or columns of W.

    weight: global [out, in] as DTensor, local [out / t, in] (columns) or [out, in / t] (rows).
    A row-split layer leaves its bias to the owner, who adds it after the reduction. `region` is for a
    replicated layer that runs inside of a region when sequences are sliced (`Region.share`).
    """

    def __init__(self, source: nn.Linear, *, skip_bias: bool = False, region: Region | None = None) -> None:
        super().__init__()
        self.weight = source.weight
        self.bias = source.bias
        self.skip_bias = skip_bias
        self.region = region

    @override
    def forward(self, x: Tensor, step: ForwardPass | None = None) -> Tensor:
        """x: [..., in], its last axis local where the weight is split by rows; returns [..., out], local for columns.

        step: of the model; only a layer with a region looks at it.
        """
        if self.region is not None:
            region = self.region if step is None else step.region
            return F.linear(x, region.weight(self), region.weight(self, "bias"))
        bias = None if self.bias is None or self.skip_bias else tensor_part(self.bias)
        return F.linear(x, tensor_part(self.weight), bias)


class ShardedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up split by columns, down by rows.

    partial=True: input is already copied to the group and the output is this rank's partial sum,
    for an owner (the MoE block) that reduces it together with others.
    """

    def __init__(self, source: Any, region: Region, *, partial: bool = False) -> None:
        super().__init__()
        self.gate_proj = ShardedLinear(source.gate_proj)
        self.up_proj = ShardedLinear(source.up_proj)
        self.down_proj = ShardedLinear(source.down_proj, skip_bias=True)
        self.act_fn: Callable[[Tensor], Tensor] = source.act_fn
        self.region = region
        self.partial = partial

    @override
    def forward(self, x: Tensor, step: ForwardPass | None = None) -> Tensor:
        """x: [B, S or slice, D]; returns the same shape, or with `partial` [B, S, D] from what entered already."""
        region = self.region if step is None else step.region
        if not self.partial:
            x = region.enter(x)
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        bias = self.down_proj.bias
        if self.partial:
            # Each rank adds its share of the bias, so that the owner's sum holds it once; the copy
            # makes the gradient of the replicated bias complete again.
            if bias is None:
                return y
            return y + region.weight_inside(self.down_proj, "bias") / group_size(region.groups.tensor())
        y = region.leave(y)
        return y if bias is None else y + region.weight(self.down_proj, "bias")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, normalised in at least float32 as transformers does.

    region: of the model, where slices of the sequence may come in; None where they never do.
    """

    def __init__(
        self, weight: nn.Parameter, eps: float, region: Region | None = None, kernels: Kernels = REFERENCE
    ) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.region = region
        self.kernels = kernels

    @override
    def forward(self, x: Tensor, step: ForwardPass | None = None) -> Tensor:
        """x: [..., D]; returns the same shape in the dtype that weight * x has."""
        if self.region is None:
            weight = tensor_part(self.weight)
        else:
            weight = (self.region if step is None else step.region).weight(self)
        return self.kernels.rms_norm(x, weight, self.eps)

    @override
    def extra_repr(self) -> str:
        """What print(model) shows of the norm: the shape of its weight and eps."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"
