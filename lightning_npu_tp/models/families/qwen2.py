"""Qwen2 and Qwen2.5, dense: grouped-query attention with biases of queries, keys and values.

Layers with a sliding window are refused.
Source: arXiv:2407.10671; module and parameter names are transformers'.
"""

from __future__ import annotations

from typing import Any

from lightning_npu_tp.models.families import common
from lightning_npu_tp.parallel.plan import Plan


def plan(config: Any) -> Plan:
    """Sharding plan of a Qwen2ForCausalLM with this config."""
    return common.frame_rules() | common.grouped_query_rules(input_bias=True) | common.mlp_rules()


QWEN2 = common.decoder_family(
    "Qwen2",
    common.grouped_attention,
    name="qwen2",
    plan=plan,
    models="Qwen2, Qwen2.5",
    refused="a sliding window",
)
