"""Qwen3-MoE: Qwen3's attention, mixtures of experts without shared ones, here and there a dense layer.

A sliding window is refused. Beside transformers' balance loss (output_router_logits, over all layers at once) there
is the blocks' own, by `aux_loss_alpha`, which goes layer by layer; both are off unless asked for.
Source: arXiv:2505.09388; module and parameter names are transformers'.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning_npu_tp.models.families import common
from lightning_npu_tp.models.layers.gqa import HeadNorm
from lightning_npu_tp.parallel.plan import Plan


def plan(config: Any) -> Plan:
    """Sharding plan of a Qwen3MoeForCausalLM with this config."""
    bias = config.attention_bias
    return (
        common.frame_rules()
        | common.grouped_query_rules(input_bias=bias, output_bias=bias)
        | common.head_norm_rules()
        | common.feed_forward_rules(config, QWEN3_MOE.num_sparse_layers(config))
    )


QWEN3_MOE = common.decoder_family(
    "Qwen3Moe",
    partial(common.grouped_attention, norm=HeadNorm),
    moe=common.plain_moe_block,
    name="qwen3_moe",
    plan=plan,
    experts="num_experts",
    sparse_layers=common.layers_by_step,
    dense_first=common.settings_by_step,
    head_norms=True,
    models="Qwen3-30B-A3B, Qwen3-235B-A22B",
    refused="a sliding window",
)
