"""Mixtral: grouped-query attention, and in every layer a mixture of experts whose weights sum to one.

A sliding window and router jitter are refused. transformers' auxiliary loss (output_router_logits, over all
layers at once) is refused as well: the blocks' own balance loss, by `aux_loss_alpha`, goes layer by layer
and is off unless the config sets it.
Source: arXiv:2401.04088; module and parameter names are transformers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.models.families import common
from lightning_npu_tp.models.families.family import BuildContext, ModelFamily
from lightning_npu_tp.models.file_names import KeyTable, Renamed, expert_keys
from lightning_npu_tp.models.layers.gqa import GroupedQueryAttention
from lightning_npu_tp.parallel.plan import Plan


def plan(config: Any) -> Plan:
    """Sharding plan of a MixtralForCausalLM with this config."""
    return common.frame_rules() | common.grouped_query_rules() | common.expert_rules()


def units(config: Any) -> Mapping[str, int]:
    """What a layout must not cut."""
    return common.attention_units(config) | {"expert": config.num_local_experts}


def keys(config: Any) -> KeyTable:
    """The published names: `block_sparse_moe`, and w1, w3, w2 for gate, up and down."""
    experts = expert_keys("*.block_sparse_moe.experts", gate="w1", up="w3", down="w2")
    return KeyTable(entries=[*experts, Renamed("*.mlp.gate.weight", "*.block_sparse_moe.gate.weight")])


def expected(config: Any) -> Mapping[str, int]:
    """How many modules of each class conversion replaces."""
    return common.frame_counts("Mixtral", config) | {"MixtralSparseMoeBlock": config.num_hidden_layers}


def check(config: Any) -> None:
    """Raise ConversionError for a variant whose numbers we would not reproduce."""
    common.check_positions("mixtral", config)
    common.check_no_router_logits("mixtral", config)
    if config.router_jitter_noise:
        raise ConversionError(
            f"router_jitter_noise={config.router_jitter_noise} is not supported for mixtral: the noise would differ "
            f"from rank to rank. Set router_jitter_noise to 0."
        )


def _attention(source: Any, context: BuildContext) -> nn.Module:
    return GroupedQueryAttention(source, context.region, context.kernels)


def _moe(source: Any, context: BuildContext) -> nn.Module:
    return common.moe_block(source, context, norm_topk_prob=True, normalisation="plain")


MIXTRAL = ModelFamily(
    name="mixtral",
    model_class="MixtralForCausalLM",
    plan=plan,
    units=units,
    expected=expected,
    check=check,
    mixins=common.MIXINS,
    swaps=common.frame_swaps("Mixtral", _attention) | {"MixtralSparseMoeBlock": _moe},
    keys=keys,
    models="Mixtral 8x7B, 8x22B",
    refused="a sliding window, `output_router_logits`, router jitter",
)
