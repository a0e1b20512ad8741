"""What a manifest says of the run that saved, and whether a checkpoint belongs to the run that loads.

Families, configs and the tokenizer are compared by name before any tensor is read: two models of the same shapes may
still mean different things by them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_npu_tp.checkpoint.manifest import Manifest
from lightning_npu_tp.checkpoint.tokenizer_files import HERE, contents_to_keep
from lightning_npu_tp.errors import CheckpointError
from lightning_npu_tp.models.families.family import ModelFamily
from lightning_npu_tp.models.families.registry import find_models
from lightning_npu_tp.parallel.layout import Layout

_PACKAGES = ("lightning_npu_tp", "torch", "lightning", "transformers")
# Of a config, what does not change what is computed from the weights.
_INDIFFERENT = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}


def manifest_of(
    trainer: Trainer, module: nn.Module, layout: Layout, families: Sequence[ModelFamily], checkpoint: dict[str, Any]
) -> Manifest:
    """The manifest of a checkpoint that Lightning has collected, without its files.

    checkpoint: Lightning's dict; says the step and how many optimizers.
    """
    return Manifest(
        step=int(checkpoint.get("global_step", 0)),
        epoch=int(checkpoint.get("epoch", 0)),
        world=layout.data * layout.tensor,
        layout={"data": layout.data, "tensor": layout.tensor, "expert": layout.expert},
        models=models_in(module, families),
        tokenizer=tokenizer_of(trainer),
        contents={
            "weights": True,
            "optimizers": len(checkpoint.get("optimizer_states", [])),
            "ranks": layout.data * layout.tensor,
        },
        versions={name: _version(name) for name in _PACKAGES},
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def models_in(module: nn.Module, families: Sequence[ModelFamily]) -> dict[str, dict[str, Any]]:
    """Path of each model of a known family -> {family, config, dtype, parameters}."""
    found = {}
    for name, model, family in find_models(module, families):
        parameters = list(model.parameters())
        config: Any = getattr(model, "config", None)
        found[name] = {
            "family": family.name,
            # As it comes back from a file: tuples are lists, dtypes are text.
            "config": json.loads(json.dumps(config.to_dict() if hasattr(config, "to_dict") else {}, default=str)),
            "dtype": str(parameters[0].dtype).removeprefix("torch.") if parameters else "none",
            "parameters": sum(parameter.numel() for parameter in parameters),
        }
    return found


def tokenizer_contents(manifest: Manifest) -> dict[str, bytes]:
    """Name -> content of the files of the manifest's tokenizer, to be saved with it; it is told of them."""
    if manifest.tokenizer is None or manifest.tokenizer["source"] is None:
        return {}
    types = {str(model["config"].get("model_type")) for model in manifest.models.values()}
    kept = contents_to_keep(Path(manifest.tokenizer["source"]), types)
    manifest.tokenizer["path"] = HERE if kept else None
    return kept


def tokenizer_of(trainer: Trainer) -> dict[str, Any] | None:
    """The tokenizer of the trainer's data module, if it has one that says who it is; `source` is where it was read."""
    tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
    fingerprint = getattr(tokenizer, "fingerprint", None)
    if fingerprint is None:
        return None
    path = getattr(tokenizer, "path", None)
    return {
        "name": str(getattr(tokenizer, "name", type(tokenizer).__name__)),
        "path": None,
        "source": None if path is None else str(path),
        "vocab_size": int(getattr(tokenizer, "vocab_size", 0)),
        "fingerprint": str(fingerprint()),
    }


def require_same_model(path: Path, stored: Manifest, current: Manifest, *, allow_other_tokenizer: bool) -> None:
    """Raise CheckpointError for a checkpoint of another family, architecture or tokenizer.

    Other sizes are told by the parameters' names, later; other settings of the same architecture are a warning.
    """
    for name, model in current.models.items():
        theirs = stored.models.get(name)
        if theirs is None:
            continue
        mine, other = (_architecture(values) for values in (model, theirs))
        if mine != other:
            raise CheckpointError(
                f"The checkpoint {path} is of a {other}, and {name or 'the module'} is a {mine}. Load it with the "
                f"model config that it was saved with (in {path}/manifest.json, if it is a folder)."
            )
        keys = model["config"].keys() | theirs["config"].keys()
        differ = sorted(
            f"{key} {theirs['config'].get(key)!r} there, {model['config'].get(key)!r} here"
            for key in keys - _INDIFFERENT
            if theirs["config"].get(key) != model["config"].get(key)
        )
        if differ:
            rank_zero_warn(f"The checkpoint {path} was saved with other settings of the model: {'; '.join(differ)}.")
    _require_same_tokenizer(path, stored.tokenizer, current.tokenizer, allow_other_tokenizer)


def misfits(wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """Which tensors are missing or of another shape, the first five by name; an empty text if all fit.

    wanted, stored: name -> global shape, None where it is not a tensor.
    """
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    problems += [
        f"{name} has shape {stored[name]} instead of {shape}"
        for name, shape in wanted.items()
        if name in stored and None not in (shape, stored[name]) and tuple(stored[name]) != tuple(shape)
    ]
    return "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")


def _architecture(model: dict[str, Any]) -> str:
    return f"{model['family']} (model_type {model['config'].get('model_type')})"


def _require_same_tokenizer(
    path: Path, stored: dict[str, Any] | None, current: dict[str, Any] | None, allow_other: bool
) -> None:
    if stored is None or current is None or stored["fingerprint"] == current["fingerprint"]:
        return
    told = (
        f"The checkpoint {path} was trained with the tokenizer {_tokenizer_in_words(stored)}, and this run has "
        f"{_tokenizer_in_words(current)}"
    )
    if not allow_other:
        raise CheckpointError(
            f"{told}: its weights take the same numbers for other words. Use that tokenizer, or set "
            f"strategy.allow_other_tokenizer=true if you mean to change it."
        )
    rank_zero_warn(f"{told}, as strategy.allow_other_tokenizer allows.")


def _tokenizer_in_words(tokenizer: dict[str, Any]) -> str:
    source = tokenizer.get("source") or tokenizer["path"]
    where = f" from {source}" if source else ""
    return f"{tokenizer['name']}{where} (vocabulary {tokenizer['vocab_size']}, {str(tokenizer['fingerprint'])[:12]})"
