"""What several model families share: plan rules, constructors and checks.

Families differ in names and in a few settings; here is what does not differ. Rules are dictionaries that a
family's plan joins, constructors take the transformers module and the context, checks raise
ConversionError. Nothing here knows a family; who asks for a rule knows that its config has the setting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.models.families.family import BuildContext, Constructor
from lightning_npu_tp.models.file_names import KeyTable, expert_keys
from lightning_npu_tp.models.layers.causal_lm import ShardedCausalLM, ShardedDecoder, ShardedDecoderLayer
from lightning_npu_tp.models.layers.linear import RMSNorm, ShardedMLP
from lightning_npu_tp.models.layers.mla import MLAttention
from lightning_npu_tp.models.layers.rotary import RotaryTables, check_rope_type
from lightning_npu_tp.models.layers.vocab import VocabEmbedding, VocabHead
from lightning_npu_tp.models.moe.block import MoEBlock
from lightning_npu_tp.parallel.plan import Columns, Experts, Replicated, Rows, Rule, Vocab

MIXINS: Mapping[str, type] = {
    "": ShardedCausalLM,
    "model": ShardedDecoder,
    "model.layers": ShardedDecoderLayer,
}

_HEADS = "a head attends by itself"
_ONCE = "added once, after the reduction"
_LATENT = "one latent serves every head"


def frame_rules() -> dict[str, Rule]:
    """Embedding, head and the norms between the layers."""
    row_norm = Replicated(why="one vector; normalises whole rows", init="ones")
    return {
        "model.embed_tokens.weight": Vocab(),
        "lm_head.weight": Vocab(),
        "*layernorm.weight": row_norm,
        "model.norm.weight": row_norm,
    }


def grouped_query_rules(*, input_bias: bool = False, output_bias: bool = False) -> dict[str, Rule]:
    """Attention with q, k, v and o projections; biases of the first three, and of the last."""
    projections = {
        "*.self_attn.q_proj": "head",
        "*.self_attn.k_proj": "key head",
        "*.self_attn.v_proj": "key head",
    }
    rules = {f"{name}.weight": Columns(unit=unit, why=_HEADS) for name, unit in projections.items()}
    rules["*.self_attn.o_proj.weight"] = Rows(unit="head")
    if input_bias:
        rules |= {f"{name}.bias": Columns(unit=unit, init="zeros") for name, unit in projections.items()}
    if output_bias:
        rules["*.self_attn.o_proj.bias"] = Replicated(why=_ONCE, init="zeros")
    return rules


def head_norm_rules() -> dict[str, Rule]:
    """Norms of queries and keys, each head by itself."""
    rule = Replicated(why="one vector for every head; its gradient is summed over the heads of all ranks", init="ones")
    return {"*.self_attn.q_norm.weight": rule, "*.self_attn.k_norm.weight": rule}


def latent_rules(config: Any) -> dict[str, Rule]:
    """Multi-head latent attention, with and without a query latent."""
    heads, latent = Columns(unit="head", why=_HEADS), Replicated(why=_LATENT)
    rules = {
        "*.self_attn.kv_a_proj_with_mqa.weight": latent,
        "*.self_attn.kv_b_proj.weight": heads,
        "*.self_attn.o_proj.weight": Rows(unit="head"),
    }
    if config.q_lora_rank is None:
        rules["*.self_attn.q_proj.weight"] = heads
    else:
        rules |= {"*.self_attn.q_a_proj.weight": latent, "*.self_attn.q_b_proj.weight": heads}
    if config.attention_bias:
        bias = Replicated(why=_LATENT, init="zeros")
        rules["*.self_attn.kv_a_proj_with_mqa.bias"] = bias
        rules["*.self_attn.o_proj.bias"] = Replicated(why=_ONCE, init="zeros")
        if config.q_lora_rank is not None:
            rules["*.self_attn.q_a_proj.bias"] = bias
    return rules


def mlp_rules(prefix: str = "*.mlp", *, bias: bool = False) -> dict[str, Rule]:
    """A gated MLP at `prefix`."""
    rules = {
        f"{prefix}.gate_proj.weight": Columns(),
        f"{prefix}.up_proj.weight": Columns(),
        f"{prefix}.down_proj.weight": Rows(),
    }
    if bias:
        rules[f"{prefix}.gate_proj.bias"] = Columns(init="zeros")
        rules[f"{prefix}.up_proj.bias"] = Columns(init="zeros")
        rules[f"{prefix}.down_proj.bias"] = Replicated(why=_ONCE, init="zeros")
    return rules


def expert_rules() -> dict[str, Rule]:
    """Router and routed experts."""
    return {
        "*.mlp.gate.weight": Replicated(why="every rank routes every token it sees"),
        "*.mlp.experts.gate_up_proj": Experts(),
        "*.mlp.experts.down_proj": Experts(),
    }


def moe_keys(config: Any) -> KeyTable:
    """Files that hold each expert by itself under `mlp.experts`, as most families' do."""
    return KeyTable(entries=expert_keys("*.mlp.experts"))


def attention_units(config: Any) -> dict[str, int]:
    """Query and key heads; keys first, since what divides them divides the queries too."""
    return {"key head": config.num_key_value_heads, "head": config.num_attention_heads}


def latent_units(config: Any) -> dict[str, int]:
    """Heads, and routed experts where there are any, of DeepSeek's families."""
    numbers = {"head": config.num_attention_heads}
    if num_dense_layers(config) < config.num_hidden_layers:
        numbers["expert"] = config.n_routed_experts
    return numbers


def num_dense_layers(config: Any) -> int:
    """Layers before the first one with routed experts, of DeepSeek's families."""
    return min(config.first_k_dense_replace, config.num_hidden_layers)


def num_sparse_layers(config: Any) -> int:
    """Layers with routed experts, of Qwen's families."""
    return sum(
        index not in config.mlp_only_layers and config.num_experts > 0 and (index + 1) % config.decoder_sparse_step == 0
        for index in range(config.num_hidden_layers)
    )


def frame_counts(prefix: str, config: Any) -> dict[str, int]:
    """How many modules conversion replaces around the MLPs, in a decoder whose classes start with `prefix`."""
    return {
        "Embedding": 1,
        "Linear": 1,
        f"{prefix}RotaryEmbedding": 1,
        f"{prefix}Attention": config.num_hidden_layers,
        f"{prefix}RMSNorm": 2 * config.num_hidden_layers + 1,
    }


def frame_swaps(prefix: str, attention: Constructor) -> dict[str, Constructor]:
    """Constructors for the same modules."""
    return {
        "Embedding": lambda source, context: VocabEmbedding(source, context.region),
        "Linear": lambda source, context: VocabHead(source, context.region),
        f"{prefix}RotaryEmbedding": lambda source, context: RotaryTables(source),
        f"{prefix}Attention": attention,
        f"{prefix}RMSNorm": _norm,
    }


def _norm(source: Any, context: BuildContext) -> nn.Module:
    return RMSNorm(source.weight, source.variance_epsilon, context.region, context.kernels)


def latent_attention(source: Any, context: BuildContext) -> nn.Module:
    """Multi-head latent attention."""
    return MLAttention(source, context.region, context.kernels)


def dense_mlp(source: Any, context: BuildContext) -> nn.Module:
    """A gated MLP."""
    return ShardedMLP(source, context.region)


def moe_block(source: Any, context: BuildContext, *, make: Callable[..., MoEBlock] = MoEBlock, **settings: Any) -> Any:
    """A mixture-of-experts block with the parameters of transformers' `source`.

    settings: of `MoEBlock` and its router, beyond what every family's config has. The balance losses and the
    loss-free bias are not in transformers' config classes: checkpoints or users give them, extra keys stay
    attributes, and without them nothing is added to the loss.
    """
    config = context.config
    num_experts, _, expert_width = source.experts.down_proj.shape
    # On meta: its parameters are those of the source, which conversion shards.
    with torch.device("meta"):
        block = make(
            hidden_size=config.hidden_size,
            expert_width=expert_width,
            num_experts=num_experts,
            top_k=config.num_experts_per_tok,
            kernels=context.kernels,
            region=context.region,
            dispatcher=context.dispatcher(),
            recompute=context.recompute,
            hidden_act=config.hidden_act,
            aux_loss_alpha=getattr(config, "aux_loss_alpha", 0.0),
            seq_aux=getattr(config, "seq_aux", True),
            z_loss_coef=getattr(config, "router_z_loss_coef", 0.0),
            selection_bias=getattr(config, "selection_bias", False),
            **settings,
        )
    block.adopt_parameters(source)
    return block


def check_positions(family: str, config: Any) -> None:
    """Refuse a sliding window, as mask and cache here are those of full attention, and rotations that change."""
    check_rope_type(config)
    layer_types = getattr(config, "layer_types", None) or []
    if getattr(config, "sliding_window", None):
        setting = f"sliding_window={config.sliding_window}"
    elif any(kind != "full_attention" for kind in layer_types):
        setting = f"layer_types={sorted(set(layer_types))}"
    else:
        return
    raise ConversionError(
        f"{setting} is not supported for {family}: every layer attends to all earlier positions. Set "
        f"{'use_sliding_window to false' if hasattr(config, 'use_sliding_window') else 'sliding_window to null'}"
        f"{' and layer_types to full_attention throughout' if layer_types else ''}, if the sequences fit the window."
    )


def check_no_router_logits(family: str, config: Any) -> None:
    """Refuse transformers' own auxiliary loss, which would silently be missing from the loss."""
    if getattr(config, "output_router_logits", False):
        raise ConversionError(
            f"output_router_logits=True adds transformers' auxiliary loss over all layers, which is not supported for "
            f"{family}. Set output_router_logits to false; aux_loss_alpha balances the experts layer by layer."
        )


def check_one_key_per_head(config: Any) -> None:
    """Refuse latent attention with grouped keys."""
    if config.num_key_value_heads != config.num_attention_heads:
        raise ConversionError(
            f"num_key_value_heads={config.num_key_value_heads} differs from num_attention_heads="
            f"{config.num_attention_heads}; latent attention has one key per head. Set both alike."
        )
