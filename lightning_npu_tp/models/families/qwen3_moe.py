"""Qwen3-MoE: Qwen3's attention, mixtures of experts without shared ones, here and there a dense layer.

A sliding window is refused. transformers' auxiliary loss (output_router_logits, over all layers at once) is
refused as well: the blocks' own balance loss, by `aux_loss_alpha`, goes layer by layer and is off unless the
config sets it.
Source: arXiv:2505.09388; module and parameter names are transformers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_npu_tp.models.families import common
from lightning_npu_tp.models.families.family import BuildContext, ModelFamily
from lightning_npu_tp.models.layers.gqa import GroupedQueryAttention, HeadNorm
from lightning_npu_tp.parallel.plan import Plan


def plan(config: Any) -> Plan:
    """Sharding plan of a Qwen3MoeForCausalLM with this config."""
    bias, sparse = config.attention_bias, common.num_sparse_layers(config)
    rules = (
        common.frame_rules() | common.grouped_query_rules(input_bias=bias, output_bias=bias) | common.head_norm_rules()
    )
    if sparse < config.num_hidden_layers:
        rules |= common.mlp_rules()
    if sparse:
        rules |= common.expert_rules()
    return rules


def units(config: Any) -> Mapping[str, int]:
    """What a layout must not cut."""
    experts = {"expert": config.num_experts} if common.num_sparse_layers(config) else {}
    return common.attention_units(config) | experts


def expected(config: Any) -> Mapping[str, int]:
    """How many modules of each class conversion replaces."""
    sparse = common.num_sparse_layers(config)
    mlps = {"Qwen3MoeMLP": config.num_hidden_layers - sparse, "Qwen3MoeSparseMoeBlock": sparse}
    return common.frame_counts("Qwen3Moe", config) | mlps


def check(config: Any) -> None:
    """Raise ConversionError for a variant whose numbers we would not reproduce."""
    common.check_positions("qwen3_moe", config)
    common.check_no_router_logits("qwen3_moe", config)


def _attention(source: Any, context: BuildContext) -> nn.Module:
    return GroupedQueryAttention(source, context.region, context.kernels, norm=HeadNorm)


def _moe(source: Any, context: BuildContext) -> nn.Module:
    return common.moe_block(source, context, norm_topk_prob=bool(context.config.norm_topk_prob), normalisation="plain")


QWEN3_MOE = ModelFamily(
    name="qwen3_moe",
    model_class="Qwen3MoeForCausalLM",
    plan=plan,
    units=units,
    expected=expected,
    check=check,
    mixins=common.MIXINS,
    swaps=common.frame_swaps("Qwen3Moe", _attention)
    | {"Qwen3MoeMLP": common.dense_mlp, "Qwen3MoeSparseMoeBlock": _moe},
    keys=common.moe_keys,
    models="Qwen3-30B-A3B, Qwen3-235B-A22B",
    refused="a sliding window, `output_router_logits`",
)
