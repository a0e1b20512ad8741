"""DeepSeek-V3 and R1: latent attention with a query latent, sigmoid scores, a bias that balances the choice.

The selection bias is the buffer `mlp.gate.e_score_correction_bias`, kept under that name. The layers that
predict further tokens are no part of transformers' model. Balance losses, by `aux_loss_alpha`, are off
unless the config sets them.
Source: arXiv:2412.19437; module and parameter names are transformers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_npu_tp.models.families import common
from lightning_npu_tp.models.families.family import BuildContext, ModelFamily
from lightning_npu_tp.models.file_names import Ignored, KeyTable, expert_keys
from lightning_npu_tp.models.layers.linear import ShardedMLP
from lightning_npu_tp.parallel.plan import Plan


def plan(config: Any) -> Plan:
    """Sharding plan of a DeepseekV3ForCausalLM with this config."""
    rules = common.frame_rules() | common.latent_rules(config)
    num_dense = common.num_dense_layers(config)
    if num_dense:
        rules |= common.mlp_rules()
    if num_dense < config.num_hidden_layers:
        rules |= common.expert_rules() | common.mlp_rules("*.mlp.shared_experts")
    return rules


def keys(config: Any) -> KeyTable:
    """As V2's; the layers behind the last one predict further tokens in training and are not part of the model."""
    first, number = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", None) or 1
    ignored = [Ignored(f"model.layers.{first + extra}.*", "multi-token prediction") for extra in range(number)]
    return KeyTable(entries=expert_keys("*.mlp.experts"), ignored=ignored)


def expected(config: Any) -> Mapping[str, int]:
    """How many modules of each class conversion replaces."""
    dense = common.num_dense_layers(config)
    mlps = {"DeepseekV3MLP": dense, "DeepseekV3MoE": config.num_hidden_layers - dense}
    return common.frame_counts("DeepseekV3", config) | mlps


def check(config: Any) -> None:
    """Raise ConversionError for a variant whose numbers we would not reproduce."""
    common.check_positions("deepseek_v3", config)
    common.check_one_key_per_head(config)


def _moe(source: Any, context: BuildContext) -> nn.Module:
    config = context.config
    return common.moe_block(
        source,
        context,
        shared_experts=ShardedMLP(source.shared_experts, context.region, partial=True),
        scoring="sigmoid",
        topk_method="noaux_tc",
        normalisation="v3",
        num_groups=config.n_group or 1,
        topk_group=config.topk_group or 1,
        norm_topk_prob=bool(config.norm_topk_prob),
        routed_scaling_factor=config.routed_scaling_factor,
    )


DEEPSEEK_V3 = ModelFamily(
    name="deepseek_v3",
    model_class="DeepseekV3ForCausalLM",
    plan=plan,
    units=common.latent_units,
    expected=expected,
    check=check,
    mixins=common.MIXINS,
    swaps=common.frame_swaps("DeepseekV3", common.latent_attention)
    | {"DeepseekV3MLP": common.dense_mlp, "DeepseekV3MoE": _moe},
    keys=keys,
    models="DeepSeek-V3, -R1",
)
