"""Llama (1 to 3, and what shares its class): grouped-query attention and a gated MLP, without experts.

Source: arXiv:2302.13971, arXiv:2407.21783; module and parameter names are transformers'.
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
    """Sharding plan of a LlamaForCausalLM with this config."""
    bias = config.attention_bias
    return (
        common.frame_rules()
        | common.grouped_query_rules(input_bias=bias, output_bias=bias)
        | common.mlp_rules(bias=config.mlp_bias)
    )


def expected(config: Any) -> Mapping[str, int]:
    """How many modules of each class conversion replaces."""
    return common.frame_counts("Llama", config) | {"LlamaMLP": config.num_hidden_layers}


def _attention(source: Any, context: BuildContext) -> nn.Module:
    return GroupedQueryAttention(source, context.region, context.kernels)


LLAMA = ModelFamily(
    name="llama",
    model_class="LlamaForCausalLM",
    plan=plan,
    units=common.attention_units,
    expected=expected,
    check=partial(common.check_positions, "llama"),
    mixins=common.MIXINS,
    swaps=common.frame_swaps("Llama", _attention) | {"LlamaMLP": common.dense_mlp},
    models="Llama 1 to 3.3, and others with its class",
)
