"""Save and load a trainer's state: torch's distributed checkpoint for tensors, one file for the rest.

Sharded: a folder in which every rank writes its shards (DCP) and rank 0 the remaining state, in
Lightning's layout, so that Lightning's consolidation script reads it. Full: one file that rank 0
writes with everything gathered. Both load into any layout, since DCP and the full tensors are cut
anew by whoever loads. Nothing is unpickled that torch's weights-only loader refuses.
"""

from __future__ import annotations

import pickle
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from lightning_npu_tp.errors import CheckpointError

REST_FILE = "meta.pt"
_DCP_FILE = ".metadata"
# The name that Lightning's consolidation script looks for.
_MODEL_KEY = "model"


def is_sharded(path: Path) -> bool:
    """Whether `path` is a sharded checkpoint folder."""
    return path.is_dir() and (path / REST_FILE).is_file()


def plain(value: Any) -> Any:
    """OmegaConf containers, wherever they sit in `value`, as plain dicts and lists.

    A DictConfig in the hyper-parameters makes a checkpoint that the weights-only loader refuses.
    """
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is not None and isinstance(value, omegaconf.Container):
        return omegaconf.OmegaConf.to_container(value, resolve=True)
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    return value


def model_state(model: nn.Module, *, full: bool) -> dict[str, Any]:
    """Parameters and buffers by name: shards, or whole tensors on rank 0 (elsewhere nothing)."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=full, cpu_offload=True))


def optimizer_state(model: nn.Module, optimizer: Optimizer, *, full: bool) -> dict[str, Any]:
    """Optimizer state keyed by parameter name, shards or whole."""
    options = StateDictOptions(full_state_dict=full, cpu_offload=True)
    return get_optimizer_state_dict(model, optimizer, options=options)


def save_sharded(checkpoint: dict[str, Any], path: Path, *, is_main: bool) -> None:
    """Write a checkpoint as Lightning hands it over; every rank calls it."""
    rest = dict(checkpoint)
    tensors = {_MODEL_KEY: rest.pop("state_dict")}
    for index, state in enumerate(rest.pop("optimizer_states", [])):
        tensors[f"optimizer_{index}"] = state
    if path.is_file():
        raise CheckpointError(
            f"The checkpoint folder {path} cannot be made: a file of that name exists. Choose another name, or move "
            f"the file away."
        )
    if is_main and is_sharded(path):
        # Shards of another layout would stay beside the new ones.
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    dcp.save(tensors, checkpoint_id=path)
    if is_main:
        torch.save(plain(rest), path / REST_FILE)


def save_full(checkpoint: dict[str, Any], path: Path) -> None:
    """Write everything into one file; rank 0 calls it with gathered states."""
    if path.is_dir():
        raise CheckpointError(
            f"The checkpoint file {path} cannot be written: it is a folder. Choose another name, or remove the folder."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(plain(checkpoint), path)


def load(
    path: Path, model: nn.Module, optimizers: Sequence[Optimizer], *, strict: bool, weights_only: bool | None
) -> dict[str, Any]:
    """Load either kind into the model and the optimizers, in place; every rank calls it.

    Returns the remaining state. Raises CheckpointError for a path that is neither, for parameters
    that are missing or of another shape, and for content that the weights-only loader refuses.
    """
    if is_sharded(path):
        return _load_sharded(path, model, optimizers, strict=strict, weights_only=weights_only)
    if path.is_file():
        return _load_full(path, model, optimizers, strict=strict, weights_only=weights_only)
    if path.is_dir() and (path / _DCP_FILE).is_file():
        raise CheckpointError(
            f"The checkpoint {path} is incomplete: it has shards but no {REST_FILE}, which is written last. The run "
            f"that wrote it died while saving; take an earlier checkpoint."
        )
    raise CheckpointError(f"{path} is no checkpoint: neither a folder with {REST_FILE} nor a file.")


def _read(path: Path, weights_only: bool | None) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True if weights_only is None else weights_only)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise CheckpointError(
            f"{path} holds Python objects that are not plain data{what}; loading them could run code. Store "
            f"plain containers in the hyper-parameters; for a file that you trust, set "
            f"strategy.checkpoint_weights_only=false."
        ) from error


def _load_sharded(
    path: Path, model: nn.Module, optimizers: Sequence[Optimizer], *, strict: bool, weights_only: bool | None
) -> dict[str, Any]:
    rest = _read(path / REST_FILE, weights_only)
    state = get_model_state_dict(model)
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    _check_names(path, state, {name.removeprefix(f"{_MODEL_KEY}."): meta for name, meta in stored.items()}, strict)
    if not strict:
        state = {name: value for name, value in state.items() if f"{_MODEL_KEY}.{name}" in stored}
    dcp.load({_MODEL_KEY: state}, checkpoint_id=path)
    set_model_state_dict(model, state, options=StateDictOptions(strict=strict))
    for index, optimizer in enumerate(optimizers):
        if not any(name.startswith(f"optimizer_{index}.") for name in stored):
            raise CheckpointError(
                f"The checkpoint {path} holds no state of optimizer {index}; it was saved with weights only. Start "
                f"from its weights with a new optimizer instead of resuming."
            )
        values = get_optimizer_state_dict(model, optimizer)
        dcp.load({f"optimizer_{index}": values}, checkpoint_id=path)
        set_optimizer_state_dict(model, optimizer, values)
    return rest


def _load_full(
    path: Path, model: nn.Module, optimizers: Sequence[Optimizer], *, strict: bool, weights_only: bool | None
) -> dict[str, Any]:
    checkpoint = _read(path, weights_only)
    if "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is no training checkpoint: it has no 'state_dict'.")
    weights = checkpoint.pop("state_dict")
    _check_names(path, model.state_dict(), weights, strict)
    options = StateDictOptions(full_state_dict=True, strict=strict)
    set_model_state_dict(model, weights, options=options)
    states = checkpoint.get("optimizer_states", [])
    if len(states) < len(optimizers):
        raise CheckpointError(
            f"The checkpoint {path} holds the state of {len(states)} optimizers, but the module has {len(optimizers)}; "
            f"start from its weights with new optimizers instead of resuming."
        )
    for optimizer, state in zip(optimizers, states, strict=False):
        if state["state"]:
            set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
            continue
        # torch looks for a tensor to learn the device from; a stateless optimizer has settings only.
        for group, stored in zip(optimizer.param_groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in stored.items() if name != "params"})
    return checkpoint


def _check_names(path: Path, wanted: dict[str, Any], stored: dict[str, Any], strict: bool) -> None:
    problems = []
    for name, value in wanted.items():
        if name not in stored:
            if strict:
                problems.append(f"{name} is missing")
            continue
        have = getattr(stored[name], "size", None)
        have = have() if callable(have) else have
        if have is not None and isinstance(value, torch.Tensor) and tuple(have) != tuple(value.shape):
            problems.append(f"{name} has shape {tuple(have)} instead of {tuple(value.shape)}")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(
            f"The checkpoint {path} does not fit the model: {shown}. Load it with the model config it was saved with."
        )
