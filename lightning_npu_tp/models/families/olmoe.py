"""OLMoE: queries and keys normalised over all heads together, and in every layer a mixture of experts.

Beside transformers' balance loss (output_router_logits, over all layers at once) there is the blocks' own, by
`aux_loss_alpha`, which goes layer by layer; both are off unless asked for.
Source: arXiv:2409.02060; module and parameter names are transformers'.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_npu_tp.models.families import common
from lightning_npu_tp.models.families.family import BuildContext
from lightning_npu_tp.models.layers.gqa import AllHeadsNorm
from lightning_npu_tp.parallel.plan import Columns, Plan


def plan(config: Any) -> Plan:
    """Sharding plan of an OlmoeForCausalLM with this config."""
    bias = config.attention_bias
    why = "lies as the heads do; the ranks sum their squares"
    return (
        common.frame_rules()
        | common.grouped_query_rules(input_bias=bias, output_bias=bias)
        | {
            "*.self_attn.q_norm.weight": Columns(unit="head", init="ones", why=why),
            "*.self_attn.k_norm.weight": Columns(unit="key head", init="ones", why=why),
        }
        | common.expert_rules()
    )


def _attention(source: Any, context: BuildContext) -> nn.Module:
    return common.grouped_attention(source, context, norm=AllHeadsNorm, clip=context.config.clip_qkv)


OLMOE = common.decoder_family(
    "Olmoe",
    _attention,
    moe=common.plain_moe_block,
    name="olmoe",
    plan=plan,
    experts="num_experts",
    head_norms=True,
    models="OLMoE-1B-7B",
)
