"""config.json and generation_config.json that transformers 4.57, 5 and vLLM read alike, and that are fit for use.

transformers 5 saves some settings under other names than published folders have, and 4.57 takes its class's default for
a name that it does not find, without a word: rope_parameters was rope_theta and rope_scaling, and the number of experts
has two names in several classes. Both forms are written. What a config says for training alone is not.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

# Without a cache every token of a text costs the whole text before it. Router logits are the balance loss's, and 4.57
# fails over those of a text that grows token by token.
_FOR_USE = {"use_cache": True, "output_router_logits": False}


def write_config(folder: Path, config: Any, *, class_name: str, dtype: torch.dtype) -> None:
    """Write config.json for a model of `class_name` with weights of this dtype; `config` stays as it is."""
    config = copy.deepcopy(config)
    config.architectures = [class_name]
    config.dtype = str(dtype).removeprefix("torch.")
    values: dict[str, Any] = json.loads(config.to_json_string())
    # transformers before 4.56, and engines that read the file by themselves.
    values["torch_dtype"] = values["dtype"]
    for other, name in type(config).attribute_map.items():
        if name in values:
            values.setdefault(other, values[name])
    values |= _rope_of_transformers_4(values.get("rope_parameters"))
    write_json(folder / "config.json", values | {name: value for name, value in _FOR_USE.items() if name in values})


def _rope_of_transformers_4(rope: Any) -> dict[str, Any]:
    """rope_theta and rope_scaling, from the rope_parameters of a model all of whose layers rotate alike."""
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return {}
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    # DeepSeek-V3 of 4.57 asks any rope_scaling for its factor.
    is_scaled = scaling.get("rope_type", "default") != "default"
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling if is_scaled else None}


def write_generation_config(folder: Path, generation_config: Any, published: Path | None) -> None:
    """Write generation_config.json.

    generation_config: transformers', made from the model's config; None for a model that does not generate.
    published:         a folder of the same model, whose authors' settings, where it has any, are better.
    """
    values = {} if published is None else json_object(published / "generation_config.json")
    if not values and generation_config is not None:
        values = json.loads(generation_config.to_json_string())
    if not values:
        return
    if "use_cache" in values:
        values["use_cache"] = True
    write_json(folder / "generation_config.json", values)


def told_of_readers(config: Any) -> list[str]:
    """Sentences on versions of transformers that compute something else from a right config.json."""
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type != "deepseek_v2" or not rope.get("mscale_all_dim") or rope.get("rope_type") == "default":
        return []
    return [
        f"transformers 4.57 leaves mscale_all_dim={rope['mscale_all_dim']} out of DeepSeek-V2's attention, in this "
        f"folder as in the published ones, and its logits differ: use transformers 5."
    ]


def json_object(file: Path) -> dict[str, Any]:
    """The content of a JSON file; empty where it is not there or is no object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write an object as transformers writes its own."""
    file.write_text(json.dumps(values, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")
