"""Qwen3, dense: grouped-query attention whose queries and keys are normalised head by head.

Layers with a sliding window are refused.
Source: arXiv:2505.09388; module and parameter names are transformers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from lightning_npu_tp.models.families import common
from lightning_npu_tp.models.families.family import BuildContext, ModelFamily
from lightning_npu_tp.models.layers.gqa import GroupedQueryAttention, HeadNorm
from lightning_npu_tp.parallel.plan import Plan


def plan(config: Any) -> Plan:
    """Sharding plan of a Qwen3ForCausalLM with this config."""
    bias = config.attention_bias
    return (
        common.frame_rules()
        | common.grouped_query_rules(input_bias=bias, output_bias=bias)
        | common.head_norm_rules()
        | common.mlp_rules()
    )


def expected(config: Any) -> Mapping[str, int]:
    """How many modules of each class conversion replaces."""
    return common.frame_counts("Qwen3", config) | {"Qwen3MLP": config.num_hidden_layers}


def _attention(source: Any, context: BuildContext) -> nn.Module:
    return GroupedQueryAttention(source, context.region, context.kernels, norm=HeadNorm)


QWEN3 = ModelFamily(
    name="qwen3",
    model_class="Qwen3ForCausalLM",
    plan=plan,
    units=common.attention_units,
    expected=expected,
    check=partial(common.check_positions, "qwen3"),
    mixins=common.MIXINS,
    swaps=common.frame_swaps("Qwen3", _attention) | {"Qwen3MLP": common.dense_mlp},
    models="Qwen3",
    refused="a sliding window",
)
