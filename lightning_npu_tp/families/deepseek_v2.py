"""DeepSeek-V2 and V2-Lite: latent attention, a few dense layers, then mixtures of experts.

With and without a query latent (`q_lora_rank`), greedy and group-limited routing.
Source: arXiv:2405.04434; module and parameter names are transformers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.families.family import BuildContext, ModelFamily
from lightning_npu_tp.layers.causal_lm import ShardedCausalLM, ShardedDecoder
from lightning_npu_tp.layers.linear import RMSNorm, ShardedMLP
from lightning_npu_tp.layers.mla import MLAttention
from lightning_npu_tp.layers.rotary import RotaryTables
from lightning_npu_tp.layers.vocab import VocabEmbedding, VocabHead
from lightning_npu_tp.moe.block import MoEBlock
from lightning_npu_tp.plan import Columns, Experts, Plan, Replicated, Rows, Vocab

_TOPK_METHODS = ("greedy", "group_limited_greedy")


def _num_dense_layers(config: Any) -> int:
    return min(config.first_k_dense_replace, config.num_hidden_layers)


def plan(config: Any) -> Plan:
    """Sharding plan of a DeepseekV2ForCausalLM with this config."""
    heads = Columns(unit="head", why="a head attends by itself")
    latent = "one latent serves every head"
    rules = {
        "model.embed_tokens.weight": Vocab(),
        "lm_head.weight": Vocab(),
        "*norm.weight": Replicated(why="one vector; normalises whole rows", init="ones"),
        "*.self_attn.kv_a_proj_with_mqa.weight": Replicated(why=latent),
        "*.self_attn.kv_b_proj.weight": heads,
        "*.self_attn.o_proj.weight": Rows(unit="head"),
    }
    if config.q_lora_rank is None:
        rules["*.self_attn.q_proj.weight"] = heads
    else:
        rules["*.self_attn.q_a_proj.weight"] = Replicated(why=latent)
        rules["*.self_attn.q_b_proj.weight"] = heads
    if config.attention_bias:
        rules["*.self_attn.kv_a_proj_with_mqa.bias"] = Replicated(why=latent, init="zeros")
        rules["*.self_attn.o_proj.bias"] = Replicated(why="added once, after the reduction", init="zeros")
        if config.q_lora_rank is not None:
            rules["*.self_attn.q_a_proj.bias"] = Replicated(why=latent, init="zeros")
    num_dense = _num_dense_layers(config)
    if num_dense:
        rules |= _mlp_rules("*.mlp", config)
    if num_dense < config.num_hidden_layers:
        rules |= _mlp_rules("*.mlp.shared_experts", config)
        rules["*.mlp.gate.weight"] = Replicated(why="every rank routes every token it sees")
        rules["*.mlp.experts.gate_up_proj"] = Experts()
        rules["*.mlp.experts.down_proj"] = Experts()
    return rules


def _mlp_rules(prefix: str, config: Any) -> Plan:
    rules = {
        f"{prefix}.gate_proj.weight": Columns(),
        f"{prefix}.up_proj.weight": Columns(),
        f"{prefix}.down_proj.weight": Rows(),
    }
    if config.mlp_bias:
        rules[f"{prefix}.gate_proj.bias"] = Columns(init="zeros")
        rules[f"{prefix}.up_proj.bias"] = Columns(init="zeros")
        rules[f"{prefix}.down_proj.bias"] = Replicated(why="added once, after the reduction", init="zeros")
    return rules


def units(config: Any) -> Mapping[str, int]:
    """What a layout must not cut."""
    numbers = {"head": config.num_attention_heads}
    if _num_dense_layers(config) < config.num_hidden_layers:
        numbers["expert"] = config.n_routed_experts
    return numbers


def expected(config: Any) -> Mapping[str, int]:
    """How many modules of each class conversion replaces."""
    layers, dense = config.num_hidden_layers, _num_dense_layers(config)
    return {
        "Embedding": 1,
        "Linear": 1,
        "DeepseekV2RotaryEmbedding": 1,
        "DeepseekV2Attention": layers,
        "DeepseekV2RMSNorm": 2 * layers + 1,
        "DeepseekV2MLP": dense,
        "DeepseekV2Moe": layers - dense,
    }


def check(config: Any) -> None:
    """Raise ConversionError for a variant whose numbers we would not reproduce."""
    if config.topk_method not in _TOPK_METHODS:
        raise ConversionError(
            f"topk_method={config.topk_method!r} is not supported for deepseek_v2. Use one of {list(_TOPK_METHODS)}."
        )
    if config.num_key_value_heads != config.num_attention_heads:
        raise ConversionError(
            f"num_key_value_heads={config.num_key_value_heads} differs from num_attention_heads="
            f"{config.num_attention_heads}; latent attention has one key per head. Set both alike."
        )


def _norm(source: Any, context: BuildContext) -> nn.Module:
    return RMSNorm(source.weight, source.variance_epsilon, context.region)


def _moe(source: Any, context: BuildContext) -> nn.Module:
    config = context.config
    # On meta: its parameters are those of the source, which conversion shards.
    with torch.device("meta"):
        block = MoEBlock(
            hidden_size=config.hidden_size,
            expert_width=config.moe_intermediate_size,
            num_experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            kernels=context.kernels,
            region=context.region,
            dispatcher=context.dispatcher(),
            recompute=context.recompute,
            shared_experts=ShardedMLP(source.shared_experts, context.region, partial=True),
            topk_method=config.topk_method,
            num_groups=config.n_group or 1,
            topk_group=config.topk_group or 1,
            norm_topk_prob=bool(config.norm_topk_prob),
            routed_scaling_factor=config.routed_scaling_factor,
            hidden_act=config.hidden_act,
            # Not in transformers' config class; checkpoints carry them, and extra keys stay attributes.
            aux_loss_alpha=getattr(config, "aux_loss_alpha", 0.0),
            seq_aux=getattr(config, "seq_aux", True),
            z_loss_coef=getattr(config, "router_z_loss_coef", 0.0),
            selection_bias=getattr(config, "loss_free_bias", False),
        )
    block.adopt_parameters(source)
    return block


DEEPSEEK_V2 = ModelFamily(
    name="deepseek_v2",
    model_class="DeepseekV2ForCausalLM",
    plan=plan,
    units=units,
    expected=expected,
    check=check,
    mixins={"": ShardedCausalLM, "model": ShardedDecoder},
    swaps={
        "Embedding": lambda source, context: VocabEmbedding(source, context.region),
        "Linear": lambda source, context: VocabHead(source, context.region),
        "DeepseekV2RotaryEmbedding": lambda source, context: RotaryTables(source),
        "DeepseekV2Attention": lambda source, context: MLAttention(source, context.region),
        "DeepseekV2RMSNorm": _norm,
        "DeepseekV2MLP": lambda source, context: ShardedMLP(source, context.region),
        "DeepseekV2Moe": _moe,
    },
)
