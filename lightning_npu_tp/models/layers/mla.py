"""Multi-head latent attention on a rank's own heads.

Heads are split over the tensor ranks; the low-rank query and key-value latents and the rope key
serve every head, so their small projections are computed alike on each rank and enter the split
region once, which makes their gradients complete. The cache holds the latents, as transformers' does.
Source: arXiv:2405.04434, section 2.1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_npu_tp.kernels import REFERENCE, Kernels
from lightning_npu_tp.models.layers.attend import attend
from lightning_npu_tp.models.layers.linear import RMSNorm, ShardedLinear
from lightning_npu_tp.parallel.forward_pass import ForwardPass
from lightning_npu_tp.parallel.tensor_region import Region


def _norm(source: Any, region: Region, kernels: Kernels) -> RMSNorm:
    return RMSNorm(source.weight, source.variance_epsilon, region, kernels)


class MLAttention(nn.Module):
    """Drop-in for transformers' DeepseekV2Attention; children keep its names.

    Axes: B batch, S query length, L key length, H local heads, N nope dim, R rope dim, V value dim.
    """

    def __init__(self, source: Any, region: Region, kernels: Kernels = REFERENCE) -> None:
        super().__init__()
        config = source.config
        self.layer_idx = source.layer_idx
        self.q_lora_rank = source.q_lora_rank
        self.kv_lora_rank = source.kv_lora_rank
        self.nope_dim = source.qk_nope_head_dim
        self.rope_dim = source.qk_rope_head_dim
        self.value_dim = source.v_head_dim
        self.scaling = source.scaling
        self.attention_dropout = source.attention_dropout
        # DeepSeek-V3's config may say that the pairs lie as in Llama; V2 has no such setting.
        self.rotate = partial(kernels.rotate, interleaved=getattr(config, "rope_interleave", True))
        self.kernels = kernels
        self.region = region
        if self.q_lora_rank is None:
            self.q_proj = ShardedLinear(source.q_proj)
        else:
            self.q_a_proj = ShardedLinear(source.q_a_proj, region=region)
            self.q_a_layernorm = _norm(source.q_a_layernorm, region, kernels)
            self.q_b_proj = ShardedLinear(source.q_b_proj)
        self.kv_a_proj_with_mqa = ShardedLinear(source.kv_a_proj_with_mqa, region=region)
        self.kv_a_layernorm = _norm(source.kv_a_layernorm, region, kernels)
        self.kv_b_proj = ShardedLinear(source.kv_b_proj)
        self.o_proj = ShardedLinear(source.o_proj, skip_bias=True)

    def _queries(self, hidden_BSD: Tensor, region: Region, step: ForwardPass | None) -> tuple[Tensor, Tensor]:
        """This rank's queries [B, S, H * (N + R)], and what the replicated projections take in."""
        if self.q_lora_rank is None:
            entered = region.enter(hidden_BSD)
            return self.q_proj(entered), region.outside(hidden_BSD, entered)
        # With whole activations only the latents enter, which are narrower.
        alike = region.enter(hidden_BSD) if region.is_sliced else hidden_BSD
        latent = self.q_a_layernorm(self.q_a_proj(alike, step=step), step=step)
        return self.q_b_proj(region.share(latent)), alike

    @override
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
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

        queries, alike = self._queries(hidden_states, region, step)
        q_BSHE = queries.unflatten(-1, (-1, self.nope_dim + self.rope_dim))
        q_nope, q_rope = q_BSHE.split([self.nope_dim, self.rope_dim], dim=-1)
        q_BSHE = torch.cat((q_nope, self.rotate(q_rope, cos, sin)), dim=-1)

        latent, k_rope = self.kv_a_proj_with_mqa(alike, step=step).split([self.kv_lora_rank, self.rope_dim], dim=-1)
        latent = self.kv_a_layernorm(latent, step=step)
        k_rope = self.rotate(k_rope[:, :, None], cos, sin)
        if past_key_values is not None:
            latent, k_rope = past_key_values.update(latent[:, None], k_rope.transpose(1, 2), self.layer_idx)
            latent, k_rope = latent[:, 0], k_rope.transpose(1, 2)
        latent, k_rope = region.share(latent, k_rope)

        kv_BLHE = self.kv_b_proj(latent).unflatten(-1, (-1, self.nope_dim + self.value_dim))
        k_nope, v_BLHV = kv_BLHE.split([self.nope_dim, self.value_dim], dim=-1)
        k_BLHE = torch.cat((k_nope, k_rope.expand(-1, -1, k_nope.shape[2], -1)), dim=-1)

        q_BHSE, k_BHLE, v_BHLV = (x.transpose(1, 2) for x in (q_BSHE, k_BLHE, v_BLHV))
        out_BHSV = attend(self, q_BHSE, k_BHLE, v_BHLV, mask=attention_mask, step=step)
        out = region.leave(self.o_proj(out_BHSV.transpose(1, 2).flatten(2)))
        return (out if self.o_proj.bias is None else out + region.weight(self.o_proj, "bias")), None
