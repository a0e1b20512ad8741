"""Llama (1 to 3, and what shares its class): grouped-query attention and a gated MLP, without experts.

Source: arXiv:2302.13971, arXiv:2407.21783; module and parameter names are transformers'.
"""

from __future__ import annotations

from typing import Any

from lightning_npu_tp.models.families import common
from lightning_npu_tp.parallel.plan import Plan


def plan(config: Any) -> Plan:
    """Sharding plan of a LlamaForCausalLM with this config."""
    bias = config.attention_bias
    return (
        common.frame_rules()
        | common.grouped_query_rules(input_bias=bias, output_bias=bias)
        | common.mlp_rules(bias=config.mlp_bias)
    )


LLAMA = common.decoder_family(
    "Llama",
    common.grouped_attention,
    name="llama",
    plan=plan,
    models="Llama 1 to 3.3, and others with its class",
)
