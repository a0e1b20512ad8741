"""Qwen3, dense: grouped-query attention whose queries and keys are normalised head by head.

Layers with a sliding window are refused.
Source: arXiv:2505.09388; module and parameter names are transformers'.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning_npu_tp.models.families import common
from lightning_npu_tp.models.layers.gqa import HeadNorm
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


QWEN3 = common.decoder_family(
    "Qwen3",
    partial(common.grouped_attention, norm=HeadNorm),
    name="qwen3",
    plan=plan,
    head_norms=True,
    models="Qwen3",
    refused="a sliding window",
)
