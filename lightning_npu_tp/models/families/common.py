"""What several model families share: plan rules, constructors and checks.

Families differ in names and in a few settings; here is what does not differ. Rules are dictionaries that a
family's plan joins, constructors take the transformers module and the context, checks raise ConversionError, and
`decoder_family` makes a record of them. Nothing here knows a family; who asks for a rule knows that its config has
the setting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.models.families.family import BuildContext, Constructor, ModelFamily
from lightning_npu_tp.models.file_names import KeyTable, Stacked
from lightning_npu_tp.models.layers.gqa import GroupedQueryAttention
from lightning_npu_tp.models.layers.linear import RMSNorm, ShardedMLP
from lightning_npu_tp.models.layers.mla import MLAttention
from lightning_npu_tp.models.layers.rotary import RotaryTables, check_rope_type
from lightning_npu_tp.models.layers.sharded_causal_lm import ShardedCausalLM, ShardedDecoder, ShardedDecoderLayer
from lightning_npu_tp.models.layers.vocab import VocabEmbedding, VocabHead
from lightning_npu_tp.models.moe.block import MoEBlock
from lightning_npu_tp.parallel.plan import Columns, Experts, Replicated, Rows, Rule, Vocab

MIXINS: Mapping[str, type] = {
    "": ShardedCausalLM,
    "model": ShardedDecoder,
    "model.layers": ShardedDecoderLayer,
}

_GATE_UP, _DOWN = "*.mlp.experts.gate_up_proj", "*.mlp.experts.down_proj"
_HEADS = "a head attends by itself"
_ONCE = "added once, after the reduction"
_LATENT = "one latent serves every head"


def frame_rules() -> dict[str, Rule]:
    """Rules of embedding, head and the norms between the layers."""
    row_norm = Replicated(why="one vector; normalises whole rows", init="ones")
    return {
        "model.embed_tokens.weight": Vocab(),
        "lm_head.weight": Vocab(),
        "*layernorm.weight": row_norm,
        "model.norm.weight": row_norm,
    }


def grouped_query_rules(*, input_bias: bool = False, output_bias: bool = False) -> dict[str, Rule]:
    """Rules of attention with q, k, v and o projections; biases of the first three, and of the last."""
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
    """Rules of norms of queries and keys, each head by itself."""
    rule = Replicated(why="one vector for every head; its gradient is summed over the heads of all ranks", init="ones")
    return {"*.self_attn.q_norm.weight": rule, "*.self_attn.k_norm.weight": rule}


def latent_rules(config: Any) -> dict[str, Rule]:
    """Rules of multi-head latent attention, with and without a query latent."""
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
    """Rules of a gated MLP at `prefix`."""
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
    """Rules of router and routed experts."""
    return {
        "*.mlp.gate.weight": Replicated(why="every rank routes every token it sees"),
        _GATE_UP: Experts(),
        _DOWN: Experts(),
    }


def feed_forward_rules(config: Any, num_sparse: int, *, bias: bool = False, shared: str = "") -> dict[str, Rule]:
    """Rules of dense MLPs and of mixtures of experts, where there are any.

    shared: pattern of the mixtures' shared MLP; "" for none.
    """
    rules = mlp_rules(bias=bias) if num_sparse < config.num_hidden_layers else {}
    if num_sparse:
        rules |= expert_rules() | (mlp_rules(shared, bias=bias) if shared else {})
    return rules


def expert_keys(
    prefix: str = "*.mlp.experts", *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> list[Stacked]:
    """Names of the routed experts in files that hold each by itself; prefix: their list there."""
    return [
        Stacked(_GATE_UP, (f"{prefix}.#.{gate}.weight", f"{prefix}.#.{up}.weight")),
        Stacked(_DOWN, (f"{prefix}.#.{down}.weight",)),
    ]


def attention_units(config: Any) -> dict[str, int]:
    """Query and key heads; keys first, since what divides them divides the queries too."""
    return {"key head": config.num_key_value_heads, "head": config.num_attention_heads}


def latent_units(config: Any) -> dict[str, int]:
    """Heads of latent attention, each with a key of its own."""
    return {"head": config.num_attention_heads}


def layers_behind_dense(config: Any) -> int:
    """Layers with routed experts, of DeepSeek's families: all behind the first, dense ones."""
    return config.num_hidden_layers - min(config.first_k_dense_replace, config.num_hidden_layers)


def layers_by_step(config: Any) -> int:
    """Layers with routed experts, of Qwen's families: every so many, but for those that are listed as dense."""
    return sum(
        index not in config.mlp_only_layers and (index + 1) % config.decoder_sparse_step == 0
        for index in range(config.num_hidden_layers)
    )


def settings_of_dense(number: int) -> dict[str, Any]:
    """Settings by which the first `number` layers are dense and all others not; see `layers_behind_dense`."""
    return {"first_k_dense_replace": number}


def settings_by_step(number: int) -> dict[str, Any]:
    """Settings by which the first `number` layers are dense and all others not; see `layers_by_step`."""
    return {"mlp_only_layers": list(range(number)), "decoder_sparse_step": 1}


def decoder_family(
    prefix: str,
    attention: Constructor,
    *,
    heads: Callable[[Any], dict[str, int]] = attention_units,
    moe: Constructor | None = None,
    moe_class: str = "",
    checks: Sequence[Callable[[str, Any], None]] = (),
    **record: Any,
) -> ModelFamily:
    """The record of a decoder as transformers writes them, with classes whose names start with `prefix`.

    heads:     config -> heads that a layout must not cut, by unit.
    moe:       constructor of the mixture of experts; its class is `moe_class`, else {prefix}SparseMoeBlock.
    checks:    raise ConversionError for a family and config with other numbers; positions are checked anyway.
    record:    what else `ModelFamily` has.
    """
    attentions, norms, mlps = (f"{prefix}{kind}" for kind in ("Attention", "RMSNorm", "MLP"))
    rotary, moes = f"{prefix}RotaryEmbedding", moe_class or f"{prefix}SparseMoeBlock"
    swaps: dict[str, Constructor] = {
        "Embedding": lambda source, context: VocabEmbedding(source, context.region, context.kernels),
        "Linear": lambda source, context: VocabHead(source, context.region, context.kernels),
        rotary: lambda source, context: RotaryTables(source),
        attentions: attention,
        norms: _norm,
        mlps: dense_mlp,
    }
    if moe is not None:
        swaps[moes] = moe
        record = {"keys": lambda config: KeyTable(entries=expert_keys())} | record

    def units(config: Any) -> dict[str, int]:
        return heads(config) | ({"expert": family.num_experts(config)} if family.num_sparse_layers(config) else {})

    def expected(config: Any) -> dict[str, int]:
        layers, sparse = config.num_hidden_layers, family.num_sparse_layers(config)
        around = {"Embedding": 1, "Linear": 1, rotary: 1, norms: 2 * layers + 1}
        return around | {attentions: layers, mlps: layers - sparse, moes: sparse}

    def check(config: Any) -> None:
        for one in (check_positions, *checks):
            one(family.name, config)

    family = ModelFamily(
        model_class=f"{prefix}ForCausalLM",
        units=units,
        expected=expected,
        check=check,
        mixins=MIXINS,
        swaps=swaps,
        **record,
    )
    return family


def _norm(source: Any, context: BuildContext) -> nn.Module:
    return RMSNorm(source.weight, source.variance_epsilon, context.region, context.kernels)


def latent_attention(source: Any, context: BuildContext) -> nn.Module:
    """Constructor of multi-head latent attention."""
    return MLAttention(source, context.region, context.kernels)


def grouped_attention(source: Any, context: BuildContext, **settings: Any) -> nn.Module:
    """Constructor of grouped-query attention; settings: of `GroupedQueryAttention`."""
    return GroupedQueryAttention(source, context.region, context.kernels, **settings)


def dense_mlp(source: Any, context: BuildContext) -> nn.Module:
    """Constructor of a gated MLP that is a layer's own."""
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


def plain_moe_block(source: Any, context: BuildContext, **settings: Any) -> Any:
    """A block whose weights are divided by their plain sum where the config says so, in the way of Qwen and OLMoE."""
    normalise = bool(context.config.norm_topk_prob)
    return moe_block(source, context, norm_topk_prob=normalise, normalisation="plain", **settings)


def check_positions(family: str, config: Any) -> None:
    """Refuse a sliding window, as mask and cache here are those of full attention, and rotations that change."""
    check_rope_type(config)
    if getattr(config, "is_causal", True) is False:
        raise ConversionError(
            f"is_causal=False is not supported for {family}: every layer attends to earlier positions only. Leave it "
            f"out of the config, or pass a 4-D attention_mask to each forward."
        )
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


def check_one_key_per_head(family: str, config: Any) -> None:
    """Refuse latent attention with grouped keys."""
    if config.num_key_value_heads != config.num_attention_heads:
        raise ConversionError(
            f"num_key_value_heads={config.num_key_value_heads} differs from num_attention_heads="
            f"{config.num_attention_heads}; latent attention of {family} has one key per head. Set both alike."
        )
