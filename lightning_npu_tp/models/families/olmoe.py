"""OLMoE: queries and keys normalised over all heads together, and in every layer a mixture of experts.

transformers' auxiliary loss (output_router_logits, over all layers at once) is refused: the blocks' own
balance loss, by `aux_loss_alpha`, goes layer by layer and is off unless the config sets it.
Source: arXiv:2409.02060; module and parameter names are transformers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_npu_tp.models.families import common
from lightning_npu_tp.models.families.family import BuildContext, ModelFamily
from lightning_npu_tp.models.layers.gqa import AllHeadsNorm, GroupedQueryAttention
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


def units(config: Any) -> Mapping[str, int]:
    """What a layout must not cut."""
    return common.attention_units(config) | {"expert": config.num_experts}


def expected(config: Any) -> Mapping[str, int]:
    """How many modules of each class conversion replaces."""
    return common.frame_counts("Olmoe", config) | {"OlmoeSparseMoeBlock": config.num_hidden_layers}


def check(config: Any) -> None:
    """Raise ConversionError for a variant whose numbers we would not reproduce."""
    common.check_positions("olmoe", config)
    common.check_no_router_logits("olmoe", config)


def _attention(source: Any, context: BuildContext) -> nn.Module:
    return GroupedQueryAttention(
        source, context.region, context.kernels, norm=AllHeadsNorm, clip=context.config.clip_qkv
    )


def _moe(source: Any, context: BuildContext) -> nn.Module:
    return common.moe_block(source, context, norm_topk_prob=bool(context.config.norm_topk_prob), normalisation="plain")


OLMOE = ModelFamily(
    name="olmoe",
    model_class="OlmoeForCausalLM",
    plan=plan,
    units=units,
    expected=expected,
    check=check,
    mixins=common.MIXINS,
    swaps=common.frame_swaps("Olmoe", _attention) | {"OlmoeSparseMoeBlock": _moe},
    keys=common.moe_keys,
    models="OLMoE-1B-7B",
    refused="`output_router_logits`",
)
