"""The user's model made small: fewer layers, narrower, and divisible by the same numbers of ranks.

What a layout splits keeps its remainder: heads, key heads, channels and vocabulary by the tensor ranks,
experts by the expert ranks. So the small model is cut where the real one is, evenly or not. Works on the
keys of a transformers config, by name, and by the family's record; what neither knows stays as it is. Builds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from lightning_npu_tp.models.families.family import ModelFamily
from lightning_npu_tp.models.families.registry import family_of
from lightning_npu_tp.parallel.layout import Layout

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


def shrink(config: Any, layout: Layout, families: Sequence[ModelFamily] = ()) -> Any:
    """A small config of the same class; `config` stays as it is. families: the user's own.

    At least one layer of each kind stays (dense, mixture of experts). Dropout and router noise, which no two
    layouts draw alike, and balance losses of transformers' own are off; weights are wider, so that routers decide.
    """
    family = family_of(config, families)
    small = config_with_few_layers(config, families).to_dict()
    small |= _attention(small, layout.tensor)
    if family and family.num_experts(config):
        # The dictionary has the settings by the names that the class keeps them under.
        setting = type(config).attribute_map.get(family.experts, family.experts)
        small |= _experts(small, setting, layout.expert)
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
    return type(config).from_dict(small | dict(family.small if family else {}))


def config_with_few_layers(config: Any, families: Sequence[ModelFamily] = ()) -> Any:
    """The config with one dense layer and two others, or with two where all layers are alike; all sizes as they are."""
    small = config.to_dict()
    small |= {"dtype": None, "num_hidden_layers": min(config.num_hidden_layers, 2)}
    small.pop("quantization_config", None)
    family = family_of(config, families)
    if family and family.num_experts(config):
        sparse = family.num_sparse_layers(config)
        dense = min(config.num_hidden_layers - sparse, 1)
        small |= {"num_hidden_layers": dense + min(sparse, 2), **family.dense_first(dense)}
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


def _experts(config: dict[str, Any], setting: str, ranks: int) -> dict[str, Any]:
    experts, picks = config[setting], min(config["num_experts_per_tok"], 4)
    groups = config.get("n_group") or 1
    if groups == 1:
        number = smaller(experts, max(8, 2 * ranks, 2 * picks), ranks)
    else:
        allowed = config.get("topk_group") or groups
        sizes = (n for n in _up_to(experts // groups, 2) if groups * n % ranks == experts % ranks)
        number = groups * next(n for n in sizes if allowed * n >= picks)
    return {setting: number, "num_experts_per_tok": picks}


def _up_to(last: int, first: int) -> Iterator[int]:
    """Numbers from `first` on, and at the end `last` in any case: the real model's, which always fits."""
    for number in count(first):
        if number >= last:
            break
        yield number
    yield last
