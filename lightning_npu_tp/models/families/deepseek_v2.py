"""DeepSeek-V2 and V2-Lite: latent attention, a few dense layers, then mixtures of experts.

With and without a query latent (`q_lora_rank`), greedy and group-limited routing.
Source: arXiv:2405.04434; module and parameter names are transformers'.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.models.families import common
from lightning_npu_tp.models.families.family import BuildContext
from lightning_npu_tp.models.layers.linear import ShardedMLP
from lightning_npu_tp.parallel.plan import Plan

_TOPK_METHODS = ("greedy", "group_limited_greedy")


def plan(config: Any) -> Plan:
    """Sharding plan of a DeepseekV2ForCausalLM, or V3, with this config."""
    sparse, bias = DEEPSEEK_V2.num_sparse_layers(config), getattr(config, "mlp_bias", False)
    feed_forward = common.feed_forward_rules(config, sparse, bias=bias, shared="*.mlp.shared_experts")
    return common.frame_rules() | common.latent_rules(config) | feed_forward


def check_topk_method(family: str, config: Any) -> None:
    """Refuse ways to choose experts that are not DeepSeek-V2's own."""
    if config.topk_method not in _TOPK_METHODS:
        raise ConversionError(
            f"topk_method={config.topk_method!r} is not supported for {family}. Use one of {list(_TOPK_METHODS)}."
        )


def moe_block(source: Any, context: BuildContext, **settings: Any) -> nn.Module:
    """Routed experts in groups, beside shared ones; settings: of the router, beyond what both versions have."""
    config = context.config
    return common.moe_block(
        source,
        context,
        shared_experts=ShardedMLP(source.shared_experts, context.region, partial=True),
        num_groups=config.n_group or 1,
        topk_group=config.topk_group or 1,
        norm_topk_prob=bool(config.norm_topk_prob),
        routed_scaling_factor=config.routed_scaling_factor,
        **settings,
    )


def _moe(source: Any, context: BuildContext) -> nn.Module:
    return moe_block(source, context, topk_method=context.config.topk_method)


DEEPSEEK_V2 = common.decoder_family(
    "DeepseekV2",
    common.latent_attention,
    heads=common.latent_units,
    moe=_moe,
    moe_class="DeepseekV2Moe",
    checks=[check_topk_method, common.check_one_key_per_head],
    name="deepseek_v2",
    plan=plan,
    experts="n_routed_experts",
    sparse_layers=common.layers_behind_dense,
    dense_first=common.settings_of_dense,
    # transformers reads it and ignores it, so there would be nothing to compare with.
    small={"norm_topk_prob": False},
    models="DeepSeek-V2, -V2.5, -V2-Lite, -Coder-V2",
    refused="other `topk_method`s than greedy and group_limited_greedy",
)
