"""Mixtral: grouped-query attention, and in every layer a mixture of experts whose weights sum to one.

A sliding window and router jitter are refused. Beside transformers' balance loss (output_router_logits, over all
layers at once) there is the blocks' own, by `aux_loss_alpha`, which goes layer by layer; both are off unless asked for.
Source: arXiv:2401.04088; module and parameter names are transformers'.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.models.families import common
from lightning_npu_tp.models.file_names import KeyTable, Renamed
from lightning_npu_tp.parallel.plan import Plan


def plan(config: Any) -> Plan:
    """Sharding plan of a MixtralForCausalLM with this config."""
    return common.frame_rules() | common.grouped_query_rules() | common.expert_rules()


def keys(config: Any) -> KeyTable:
    """The published names: `block_sparse_moe`, and w1, w3, w2 for gate, up and down."""
    experts = common.expert_keys("*.block_sparse_moe.experts", gate="w1", up="w3", down="w2")
    return KeyTable(entries=[*experts, Renamed("*.mlp.gate.weight", "*.block_sparse_moe.gate.weight")])


def check_no_jitter(family: str, config: Any) -> None:
    """Refuse noise of the router."""
    if config.router_jitter_noise:
        raise ConversionError(
            f"router_jitter_noise={config.router_jitter_noise} is not supported for {family}: the noise would differ "
            f"from rank to rank. Set router_jitter_noise to 0."
        )


MIXTRAL = common.decoder_family(
    "Mixtral",
    common.grouped_attention,
    moe=partial(common.moe_block, norm_topk_prob=True, normalisation="plain"),
    checks=[check_no_jitter],
    name="mixtral",
    plan=plan,
    keys=keys,
    experts="num_local_experts",
    models="Mixtral 8x7B, 8x22B",
    refused="a sliding window, router jitter",
)
