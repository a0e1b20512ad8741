"""The user's model made small: fewer layers, narrower, and divisible by the same numbers of ranks.

What a layout splits keeps its remainder: heads, key heads, channels and vocabulary by the tensor ranks,
experts by the expert ranks. So the small model is cut where the real one is, evenly or not. Works on the
keys of a transformers config, by name; what it does not know stays as it is. Builds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from lightning_npu_tp.parallel.layout import Layout

_EXPERT_KEYS = ("n_routed_experts", "num_local_experts", "num_experts")
# Widths that no layout splits; the value's differs from the keys', so that mixing them up cannot go unseen.
_WIDTHS = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
# Channels, split over the tensor ranks where they are not an expert's.
_CHANNELS = {"intermediate_size": 96, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
_TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 5}
# With the usual 0.02 the router is flat and the attention uniform, and mistakes in them are small.
_INITIALIZER_RANGE = 0.1


def smaller(size: int, about: int, ranks: int) -> int:
    """A number from `about` on with the remainder that `size` leaves when divided by `ranks`; never above `size`."""
    return size if size <= about else about + (size - about) % ranks


def shrink(config: Any, layout: Layout) -> Any:
    """A small config of the same class; `config` stays as it is.

    At least one layer of each kind stays (dense, mixture of experts). Dropout and router noise, which no two
    layouts draw alike, and balance losses of transformers' own are off; weights are wider, so that routers decide.
    """
    small = config_with_few_layers(config).to_dict()
    small |= _attention(small, layout.tensor)
    if any(small.get(key) for key in _EXPERT_KEYS):
        small |= _experts(small, layout.expert)
    small |= {key: min(small[key], width) for key, width in _WIDTHS.items() if small.get(key)}
    if small.get("qk_rope_head_dim"):
        # The config classes derive them when they are made, and keep what a dictionary says.
        derived = {"head_dim": small["qk_rope_head_dim"]}
        derived["qk_head_dim"] = small["qk_rope_head_dim"] + small["qk_nope_head_dim"]
        small |= {key: value for key, value in derived.items() if key in small}
    small |= {key: smaller(small[key], about, layout.tensor) for key, about in _CHANNELS.items() if small.get(key)}
    small["vocab_size"] = smaller(small["vocab_size"], 128, layout.tensor)
    for key, token in _TOKEN_IDS.items():
        if isinstance(small.get(key), int) and small[key] >= small["vocab_size"]:
            small[key] = token
    small |= {key: 0.0 for key, value in small.items() if "dropout" in key or key == "router_jitter_noise"}
    small |= {"initializer_range": _INITIALIZER_RANGE, "use_cache": False, "output_router_logits": False}
    if small.get("model_type") == "deepseek_v2":
        # transformers reads it for this model and ignores it, so there would be nothing to compare with.
        small["norm_topk_prob"] = False
    return type(config).from_dict(small)


def config_with_few_layers(config: Any) -> Any:
    """The config with one dense layer and two others, or with two where all layers are alike; all sizes as they are."""
    small = config.to_dict()
    small |= {"dtype": None}
    small.pop("quantization_config", None)
    layers = small["num_hidden_layers"]
    has_experts = any(small.get(key) for key in _EXPERT_KEYS)
    if "first_k_dense_replace" in small and has_experts:
        dense = min(small["first_k_dense_replace"], layers)
        small |= {"num_hidden_layers": min(dense, 1) + min(layers - dense, 2), "first_k_dense_replace": min(dense, 1)}
    elif "mlp_only_layers" in small and has_experts:
        step = small.get("decoder_sparse_step") or 1
        listed = small["mlp_only_layers"] or []
        dense = sum(layer in listed or (layer + 1) % step > 0 for layer in range(layers))
        small |= {"num_hidden_layers": min(dense, 1) + min(layers - dense, 2), "decoder_sparse_step": 1}
        small["mlp_only_layers"] = [0] if dense else []
    else:
        small["num_hidden_layers"] = min(layers, 2)
    kinds = small.get("layer_types")
    if kinds:
        each = list(dict.fromkeys(kinds))
        small["layer_types"] = [each[layer % len(each)] for layer in range(small["num_hidden_layers"])]
    return type(config).from_dict(small)


def _attention(config: dict[str, Any], ranks: int) -> dict[str, Any]:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    key_heads = config.get("num_key_value_heads") or heads
    few = smaller(key_heads, max(ranks, 4 if heads == key_heads else 2), ranks)
    shared_by = heads // key_heads
    if shared_by > 1:
        shared_by = next(n for n in _up_to(shared_by, 2) if few * n % ranks == heads % ranks)
    small = {"num_attention_heads": few * shared_by, "hidden_size": few * shared_by * 16}
    if config.get("num_key_value_heads"):
        small["num_key_value_heads"] = few
    if config.get("head_dim") and not config.get("qk_rope_head_dim"):
        # Heads that together are wider than the model stay so.
        small["head_dim"] = 16 if config["head_dim"] * heads == hidden else 24
    return small


def _experts(config: dict[str, Any], ranks: int) -> dict[str, Any]:
    key = next(key for key in _EXPERT_KEYS if config.get(key))
    experts, picks = config[key], min(config["num_experts_per_tok"], 4)
    groups = config.get("n_group") or 1
    if groups == 1:
        number = smaller(experts, max(8, 2 * ranks, 2 * picks), ranks)
    else:
        allowed = config.get("topk_group") or groups
        sizes = (n for n in _up_to(experts // groups, 2) if groups * n % ranks == experts % ranks)
        number = groups * next(n for n in sizes if allowed * n >= picks)
    return {key: number, "num_experts_per_tok": picks}


def _up_to(last: int, first: int) -> Iterator[int]:
    """Numbers from `first` on, and at the end `last` in any case: the real model's, which always fits."""
    for number in count(first):
        if number >= last:
            break
        yield number
    yield last
