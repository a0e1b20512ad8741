"""Grouped-query attention on a rank's own heads: several query heads share one key head.

Query and key heads are split alike over the tensor ranks, so that a rank's queries find their keys at
home; conversion refuses layouts that would cut a group. Multi-head attention is the case of groups of one.
Queries and keys may be normalised, each head by itself or all heads together. Sliding windows are left
out: the families refuse them. The cache holds this rank's key heads.
Source: arXiv:2305.13245; heads, names and order of operations are transformers'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_npu_tp.kernels import REFERENCE, Kernels
from lightning_npu_tp.models.layers.attend import attend
from lightning_npu_tp.models.layers.linear import ShardedLinear
from lightning_npu_tp.parallel.collectives import group_size
from lightning_npu_tp.parallel.forward_pass import ForwardPass
from lightning_npu_tp.parallel.tensor_region import Region, tensor_part


class HeadNorm(nn.Module):
    """RMS norm of each head by itself, one weight for all heads (Qwen3).

    weight: [E], replicated; every rank applies it to its own heads.
    """

    def __init__(self, source: Any, region: Region, kernels: Kernels = REFERENCE) -> None:
        super().__init__()
        self.weight = source.weight
        self.eps = source.variance_epsilon
        self.region = region
        self.kernels = kernels

    @override
    def forward(self, x: Tensor) -> Tensor:
        """x: local [B, S, H * E], inside of the region; returns the same shape."""
        weight_E = self.region.weight_inside(self)
        x_BSHE = x.unflatten(-1, (-1, weight_E.shape[0]))
        return self.kernels.rms_norm(x_BSHE, weight_E, self.eps).flatten(-2)


class AllHeadsNorm(nn.Module):
    """RMS norm over all heads together, those of the other ranks included (OLMoE).

    weight: global [H * E], local [H * E / t], split as the heads are. No kernel sums over ranks: plain PyTorch.
    """

    def __init__(self, source: Any, region: Region, kernels: Kernels = REFERENCE) -> None:
        super().__init__()
        self.weight = source.weight
        self.eps = source.variance_epsilon
        self.region = region

    @override
    def forward(self, x: Tensor) -> Tensor:
        """x: local [B, S, H * E / t], inside of the region; returns the same shape."""
        ranks = group_size(self.region.groups.tensor())
        weight = tensor_part(self.weight)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        partial = wide.square().sum(dim=-1, keepdim=True)
        mean = self.region.total_inside(partial) / (x.shape[-1] * ranks)
        return weight * (wide * torch.rsqrt(mean + self.eps)).to(x.dtype)


class GroupedQueryAttention(nn.Module):
    """Drop-in for the attention of transformers' Llama and its kin; children keep their names.

    Axes: B batch, S query length, L key length, H local query heads, K local key heads, E head size.

    norm: what normalises queries and keys, made of the source's `q_norm` and `k_norm`; None for a family
          without.
    clip: queries, keys and values are clamped to [-clip, clip]; None leaves them.
    """

    def __init__(
        self,
        source: Any,
        region: Region,
        kernels: Kernels = REFERENCE,
        *,
        norm: Callable[[Any, Region, Kernels], nn.Module] | None = None,
        clip: float | None = None,
    ) -> None:
        super().__init__()
        self.layer_idx = source.layer_idx
        self.head_dim = source.head_dim
        self.scaling = source.scaling
        self.attention_dropout = source.attention_dropout
        self.clip = clip
        self.kernels = kernels
        self.region = region
        self.q_proj = ShardedLinear(source.q_proj)
        self.k_proj = ShardedLinear(source.k_proj)
        self.v_proj = ShardedLinear(source.v_proj)
        self.o_proj = ShardedLinear(source.o_proj, skip_bias=True)
        self.q_norm = None if norm is None else norm(source.q_norm, region, kernels)
        self.k_norm = None if norm is None else norm(source.k_norm, region, kernels)

    def _heads(self, entered_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's queries [B, S, H, E], keys and values [B, S, K, E], before rotation."""
        q, k, v = self.q_proj(entered_BSD), self.k_proj(entered_BSD), self.v_proj(entered_BSD)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (x.clamp(-self.clip, self.clip) for x in (q, k, v))
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        return q, k, v

    @override
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        step: ForwardPass | None = None,
        position_ids: Any = None,
        use_cache: Any = None,
    ) -> tuple[Tensor, None]:
        """hidden_states: [B, S or slice, D]; attention_mask: bool [B, 1, S, L], None means causal.

        position_ids, use_cache: as transformers hands them to every layer; read above.
        Returns (the same shape, None).
        """
        assert position_embeddings is not None, "the decoder hands the rotary tables to every layer"
        region = self.region if step is None else step.region
        cos, sin = position_embeddings
        entered_BSD = region.enter(hidden_states)
        q_BSHE, k_BSKE, v_BSKE = self._heads(entered_BSD)
        q_BHSE, k_BKLE = (self.kernels.rotate(x, cos, sin, interleaved=False).transpose(1, 2) for x in (q_BSHE, k_BSKE))
        v_BKLE = v_BSKE.transpose(1, 2)
        if past_key_values is not None:
            k_BKLE, v_BKLE = past_key_values.update(k_BKLE, v_BKLE, self.layer_idx)
        out_BHSE = attend(self, q_BHSE, k_BKLE, v_BKLE, mask=attention_mask, step=step)
        out = region.leave(self.o_proj(out_BHSE.transpose(1, 2).flatten(2)))
        return (out if self.o_proj.bias is None else out + region.weight(self.o_proj, "bias")), None
