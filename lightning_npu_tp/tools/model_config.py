"""A transformers config from what a user names: a folder, a config.json, or a YAML file of conf/model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.models.token_ids import require_padding_in_vocabulary
from lightning_npu_tp.weights.safetensors_reader import told_of_adapter

_CONFIG_FOLDER = Path("conf/model")


def read_model_config(model: str) -> Any:
    """A transformers config from a Hugging Face folder, a config.json, or a YAML file of conf/model by name or path.

    Raises ConfigError for anything else.
    """
    from transformers import CONFIG_MAPPING

    places = [Path(model), _CONFIG_FOLDER / model, _CONFIG_FOLDER / f"{model}.yaml"]
    places = [place / "config.json" if place.is_dir() else place for place in places]
    file = next((place for place in places if place.is_file()), None)
    if file is None and (told := told_of_adapter(Path(model))):
        raise ConfigError(f"--model {told}")
    if file is None:
        known = sorted(place.stem for place in _CONFIG_FOLDER.glob("*.yaml"))
        raise ConfigError(
            f"--model {model} is neither a folder with a config.json, nor a file, nor a config in {_CONFIG_FOLDER} "
            f"({', '.join(known) or 'which does not exist here'})."
        )
    try:
        if file.suffix in (".yaml", ".yml"):
            node = yaml.safe_load(file.read_text())
            name, values = node["architecture"], node["config"]
        else:
            values = json.loads(file.read_text())
            name = values["model_type"]
        if not isinstance(name, str) or not isinstance(values, dict):
            raise TypeError("its config is no table")
    except (yaml.YAMLError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--model {file} is no model config: {error!r}. A YAML file needs the keys architecture and config, "
            f"a JSON file needs model_type."
        ) from error
    if name not in CONFIG_MAPPING:
        raise ConfigError(f"--model {file} asks for {name!r}, which the installed transformers does not know.")
    try:
        config = CONFIG_MAPPING[name].from_dict(values)
    except Exception as error:
        # transformers' own checks of a config's fields are of many kinds.
        raise ConfigError(
            f"--model {file.parent} has a {file.name} that transformers refuses: {type(error).__name__}: "
            f"{str(error)[:500]}. Correct the file."
        ) from error
    require_padding_in_vocabulary(config, f"--model {file}")
    return config
