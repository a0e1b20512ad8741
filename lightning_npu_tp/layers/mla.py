"""Multi-head latent attention on a rank's own heads.

Heads are split over the tensor ranks; the low-rank query and key-value latents and the rope key
serve every head, so their small projections are computed alike on each rank and enter the split
region once, which makes their gradients complete. The cache holds the latents, as transformers' does.
Source: arXiv:2405.04434, section 2.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_npu_tp.collectives import copy_to_group, reduce_from_group
from lightning_npu_tp.layers.attention import attend
from lightning_npu_tp.layers.linear import RMSNorm, ShardedLinear, local
from lightning_npu_tp.layers.rotary import rotate_interleaved
from lightning_npu_tp.layout import Groups


class MLAttention(nn.Module):
    """Drop-in for transformers' DeepseekV2Attention; children keep its names.

    Axes: B batch, S query length, L key length, H local heads, N nope dim, R rope dim, V value dim.
    """

    def __init__(self, source: Any, groups: Groups) -> None:
        super().__init__()
        config = source.config
        self.layer_idx = source.layer_idx
        self.q_lora_rank = source.q_lora_rank
        self.kv_lora_rank = source.kv_lora_rank
        self.nope_dim = source.qk_nope_head_dim
        self.rope_dim = source.qk_rope_head_dim
        self.value_dim = source.v_head_dim
        self.scaling = source.scaling
        self.dropout = config.attention_dropout
        self.groups = groups
        if self.q_lora_rank is None:
            self.q_proj = ShardedLinear(source.q_proj)
        else:
            self.q_a_proj = ShardedLinear(source.q_a_proj)
            self.q_a_layernorm = RMSNorm(source.q_a_layernorm.weight, source.q_a_layernorm.variance_epsilon)
            self.q_b_proj = ShardedLinear(source.q_b_proj)
        self.kv_a_proj_with_mqa = ShardedLinear(source.kv_a_proj_with_mqa)
        self.kv_a_layernorm = RMSNorm(source.kv_a_layernorm.weight, source.kv_a_layernorm.variance_epsilon)
        self.kv_b_proj = ShardedLinear(source.kv_b_proj)
        self.o_proj = ShardedLinear(source.o_proj, skip_bias=True)

    def _queries(self, hidden_BSD: Tensor) -> Tensor:
        group = self.groups.tensor()
        if self.q_lora_rank is None:
            return self.q_proj(copy_to_group(hidden_BSD, group=group))
        return self.q_b_proj(copy_to_group(self.q_a_layernorm(self.q_a_proj(hidden_BSD)), group=group))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states: [B, S, D] replicated; attention_mask: bool [B, 1, S, L], None means causal.

        Returns ([B, S, D] replicated, None).
        """
        batch, length = hidden_states.shape[:2]
        group = self.groups.tensor()
        assert position_embeddings is not None, "the decoder hands the rotary tables to every layer"
        cos, sin = position_embeddings

        q_BSHE = self._queries(hidden_states).view(batch, length, -1, self.nope_dim + self.rope_dim)
        q_nope, q_rope = q_BSHE.split([self.nope_dim, self.rope_dim], dim=-1)
        q_BSHE = torch.cat((q_nope, rotate_interleaved(q_rope, cos, sin)), dim=-1)

        latent, k_rope = self.kv_a_proj_with_mqa(hidden_states).split([self.kv_lora_rank, self.rope_dim], dim=-1)
        latent = self.kv_a_layernorm(latent)
        k_rope = rotate_interleaved(k_rope[:, :, None], cos, sin)
        if past_key_values is not None:
            latent, k_rope = past_key_values.update(latent[:, None], k_rope.transpose(1, 2), self.layer_idx)
            latent, k_rope = latent[:, 0], k_rope.transpose(1, 2)
        latent, k_rope = copy_to_group(latent, k_rope, group=group)

        kv_BLHE = self.kv_b_proj(latent).unflatten(-1, (-1, self.nope_dim + self.value_dim))
        k_nope, v_BLHV = kv_BLHE.split([self.nope_dim, self.value_dim], dim=-1)
        k_BLHE = torch.cat((k_nope, k_rope.expand(-1, -1, k_nope.shape[2], -1)), dim=-1)

        out_BHSV = attend(
            q_BSHE.transpose(1, 2),
            k_BLHE.transpose(1, 2),
            v_BLHV.transpose(1, 2),
            mask=attention_mask,
            scale=self.scaling,
            dropout=self.dropout if self.training else 0.0,
        )
        out = reduce_from_group(self.o_proj(out_BHSV.transpose(1, 2).flatten(2)), group)
        return (out if self.o_proj.bias is None else out + local(self.o_proj.bias)), None
