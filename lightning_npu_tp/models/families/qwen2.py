"""Qwen2 and Qwen2.5, dense: grouped-query attention with biases of queries, keys and values.

Layers with a sliding window are refused.
Source: arXiv:2407.10671; module and parameter names are transformers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from lightning_npu_tp.models.families import common
from lightning_npu_tp.models.families.family import BuildContext, ModelFamily
from lightning_npu_tp.models.layers.gqa import GroupedQueryAttention
from lightning_npu_tp.parallel.plan import Plan


def plan(config: Any) -> Plan:
    """Sharding plan of a Qwen2ForCausalLM with this config."""
    return common.frame_rules() | common.grouped_query_rules(input_bias=True) | common.mlp_rules()


def expected(config: Any) -> Mapping[str, int]:
    """How many modules of each class conversion replaces."""
    return common.frame_counts("Qwen2", config) | {"Qwen2MLP": config.num_hidden_layers}


def _attention(source: Any, context: BuildContext) -> nn.Module:
    return GroupedQueryAttention(source, context.region, context.kernels)


QWEN2 = ModelFamily(
    name="qwen2",
    model_class="Qwen2ForCausalLM",
    plan=plan,
    units=common.attention_units,
    expected=expected,
    check=partial(common.check_positions, "qwen2"),
    mixins=common.MIXINS,
    swaps=common.frame_swaps("Qwen2", _attention) | {"Qwen2MLP": common.dense_mlp},
    models="Qwen2, Qwen2.5",
    refused="a sliding window",
)
