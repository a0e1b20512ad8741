"""What a Hugging Face folder holds besides weights: config, generation config, tokenizer; and which tensors it holds.

transformers itself is asked, through a model on the meta device that costs no memory: the names and order of the
tensors that its class saves, which of them are tied, its generation config.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_npu_tp.checkpoint.identity import misfits
from lightning_npu_tp.checkpoint.tokenizer_files import TOKENIZER_FILES, model_type, tokenizer_files
from lightning_npu_tp.errors import CheckpointError, ConfigError
from lightning_npu_tp.models.families.family import ModelFamily
from lightning_npu_tp.models.families.registry import FAMILIES
from lightning_npu_tp.models.file_names import Piece, all_pieces
from lightning_npu_tp.weights.hf_config import json_object, write_config, write_generation_config, write_json


@dataclass(frozen=True)
class Outline:
    """The tensors of one model: transformers' names, what the files call them, and where the source has them.

    prefix:  of the source's names.
    shapes:  by transformers' name, in its order; tied ones once.
    buffers: which of them are buffers.
    pieces:  transformers' name -> the files' tensors that it is made of.
    """

    config: Any
    class_name: str
    generation_config: Any
    prefix: str
    shapes: dict[str, tuple[int, ...]]
    buffers: frozenset[str]
    tied: frozenset[str]
    pieces: dict[str, list[Piece]] = field(repr=False, default_factory=dict)

    def left_out(self, names: Sequence[str]) -> list[str]:
        """Those of the source's tensors, by name, that the exported folder does not hold."""
        known = self.shapes.keys() | self.tied
        return [
            name for name in names if name.removeprefix(self.prefix) not in known or not name.startswith(self.prefix)
        ]


def outline(
    config: Any, available: Mapping[str, tuple[int, ...]], *, prefix: str | None, families: Sequence[ModelFamily] = ()
) -> Outline:
    """What a folder of a model with this config holds, checked against the source's shapes.

    available: name -> shape in the source.
    prefix:    of the model's names in the source; None looks for it.

    Raises CheckpointError for tensors that are missing or of another shape, ConfigError for an unknown family.
    """
    from transformers import AutoModelForCausalLM

    # As it comes from a file: a converted model's own names the attention that conversion gave it.
    config = type(config).from_dict(config.to_dict())
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        # Sizes that cannot be, classes that do not exist: transformers and torch raise all kinds of errors.
        raise ConfigError(
            f"The config of {config.model_type} makes no model: {type(error).__name__}: {str(error)[:300]}. Give the "
            f"config that it was trained with, with --config."
        ) from error
    family = next((family for family in (*families, *FAMILIES) if family.matches(model)), None)
    if family is None:
        raise ConfigError(f"{type(model).__name__} is no supported model; its ModelFamily says how files name it.")
    parameters = dict(model.named_parameters())
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict()
    buffers = frozenset(state.keys() - every)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name in parameters or name in buffers}
    prefix = _prefix(available, next(iter(shapes))) if prefix is None else prefix
    if misfit := misfits({prefix + name: shape for name, shape in shapes.items()}, available):
        raise CheckpointError(
            f"The checkpoint does not fit the model's config: {misfit}. Give the config that it was trained with, with "
            f"--config."
        )
    return Outline(
        config=config,
        class_name=type(model).__name__,
        generation_config=getattr(model, "generation_config", None),
        prefix=prefix,
        shapes=shapes,
        buffers=buffers,
        tied=frozenset(every - parameters.keys()),
        pieces=all_pieces(family.keys(config), shapes.items()),
    )


def _prefix(available: Mapping[str, Any], first: str) -> str:
    found = [name.removesuffix(first) for name in available if name == first or name.endswith(f".{first}")]
    if len(found) != 1:
        raise CheckpointError(
            f"The checkpoint holds {len(found)} models of this config (looking for {first}"
            f"{': ' + ', '.join(repr(name.rstrip('.')) for name in found) if found else ''}). "
            + ("Name one with --model." if found else "Give the config that it was trained with, with --config.")
        )
    return found[0]


def write_side_files(folder: Path, plan: Outline, dtype: torch.dtype, tokenizer: Path | None) -> None:
    """Write config.json, generation_config.json and the tokenizer's files into `folder`."""
    write_config(folder, plan.config, class_name=plan.class_name, dtype=dtype)
    for file in tokenizer_files(tokenizer) if tokenizer is not None else ():
        target = folder / (file.name if file.name in TOKENIZER_FILES else "tokenizer.json")
        if values := _tokenizer_config_of_both(file):
            write_json(target, values)
        else:
            shutil.copyfile(file, target)
    published = None
    if tokenizer is not None and tokenizer.is_dir():
        # The folder that the model came from; a checkpoint took the file over for its model, without a config.json.
        is_carried = not (tokenizer / "config.json").exists()
        published = tokenizer if is_carried or model_type(tokenizer) == plan.config.model_type else None
    write_generation_config(folder, plan.generation_config, published)


def _tokenizer_config_of_both(file: Path) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 5 wrote, in words that 4.57 knows too; empty for any other file."""
    values = json_object(file) if file.name == "tokenizer_config.json" else {}
    tokens = values.get("extra_special_tokens")
    if values.get("tokenizer_class") != "TokenizersBackend" and not isinstance(tokens, list):
        return {}
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        splitter = json_object(file.with_name("tokenizer.json")).get("pre_tokenizer") or {}
        # 4.57 sets it to false in the splitter where it is not told otherwise.
        values.setdefault("add_prefix_space", splitter.get("add_prefix_space", False))
    if isinstance(tokens, list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    return values
