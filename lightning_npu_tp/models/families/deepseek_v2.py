"""DeepSeek-V2 and V2-Lite: latent attention, a few dense layers, then mixtures of experts.

With and without a query latent (`q_lora_rank`), greedy and group-limited routing.
Source: arXiv:2405.04434; module and parameter names are transformers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.models.families import common
from lightning_npu_tp.models.families.family import BuildContext, ModelFamily
from lightning_npu_tp.models.layers.linear import ShardedMLP
from lightning_npu_tp.parallel.plan import Plan

_TOPK_METHODS = ("greedy", "group_limited_greedy")


def plan(config: Any) -> Plan:
    """Sharding plan of a DeepseekV2ForCausalLM with this config."""
    rules = common.frame_rules() | common.latent_rules(config)
    num_dense = common.num_dense_layers(config)
    if num_dense:
        rules |= common.mlp_rules(bias=config.mlp_bias)
    if num_dense < config.num_hidden_layers:
        rules |= common.expert_rules() | common.mlp_rules("*.mlp.shared_experts", bias=config.mlp_bias)
    return rules


def expected(config: Any) -> Mapping[str, int]:
    """How many modules of each class conversion replaces."""
    dense = common.num_dense_layers(config)
    mlps = {"DeepseekV2MLP": dense, "DeepseekV2Moe": config.num_hidden_layers - dense}
    return common.frame_counts("DeepseekV2", config) | mlps


def check(config: Any) -> None:
    """Raise ConversionError for a variant whose numbers we would not reproduce."""
    if config.topk_method not in _TOPK_METHODS:
        raise ConversionError(
            f"topk_method={config.topk_method!r} is not supported for deepseek_v2. Use one of {list(_TOPK_METHODS)}."
        )
    common.check_positions("deepseek_v2", config)
    common.check_one_key_per_head(config)


def _moe(source: Any, context: BuildContext) -> nn.Module:
    config = context.config
    return common.moe_block(
        source,
        context,
        shared_experts=ShardedMLP(source.shared_experts, context.region, partial=True),
        topk_method=config.topk_method,
        num_groups=config.n_group or 1,
        topk_group=config.topk_group or 1,
        norm_topk_prob=bool(config.norm_topk_prob),
        routed_scaling_factor=config.routed_scaling_factor,
    )


DEEPSEEK_V2 = ModelFamily(
    name="deepseek_v2",
    model_class="DeepseekV2ForCausalLM",
    plan=plan,
    units=common.latent_units,
    expected=expected,
    check=check,
    mixins=common.MIXINS,
    swaps=common.frame_swaps("DeepseekV2", common.latent_attention)
    | {"DeepseekV2MLP": common.dense_mlp, "DeepseekV2Moe": _moe},
    keys=common.moe_keys,
    models="DeepSeek-V2, -V2.5, -V2-Lite, -Coder-V2",
    refused="other `topk_method`s than greedy and group_limited_greedy",
)
