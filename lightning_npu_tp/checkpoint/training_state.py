"""A trainer's state as a checkpoint holds it: tensors by name in shards, one file for the rest, one for each rank.

It is a folder in Lightning's layout, so that Lightning's consolidation script makes one file of it. That file, and one
of plain Lightning, is read too. Both load into any layout, since whoever loads cuts the tensors anew. How files get to
disk whole is writer.py's, how they are read safely reader.py's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from lightning_npu_tp.checkpoint import reader, writer
from lightning_npu_tp.checkpoint.identity import misfits
from lightning_npu_tp.checkpoint.manifest import Manifest
from lightning_npu_tp.checkpoint.peers import Peers
from lightning_npu_tp.errors import CheckpointError

# The name that Lightning's consolidation script looks for.
_MODEL_KEY = "model"
# What "weights only" starts anew.
_PROGRESS = ("loops", "callbacks", "optimizer_states")


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


def model_state(model: nn.Module) -> dict[str, Any]:
    """This rank's shards of parameters and buffers, by name, on the CPU."""
    return get_model_state_dict(model, options=StateDictOptions(cpu_offload=True))


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """This rank's shards of an optimizer's state, by parameter name, on the CPU."""
    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(cpu_offload=True))


def split(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint as Lightning hands it over, as (tensors by DCP's names, the rest)."""
    rest = dict(checkpoint)
    tensors = {_MODEL_KEY: rest.pop("state_dict")}
    for index, state in enumerate(rest.pop("optimizer_states", [])):
        tensors[f"optimizer_{index}"] = state
    return tensors, plain(rest)


def detached(state: Any, model: nn.Module, optimizers: Iterable[Optimizer]) -> Any:
    """`state` with copies of the tensors that share memory with the model or the optimizers.

    A state dict "offloaded to the CPU" is the live memory where that is on the CPU already.
    """
    live = [*model.parameters(), *model.buffers(), *tree_leaves([optimizer.state for optimizer in optimizers])]
    places = {_place(tensor) for tensor in live if isinstance(tensor, Tensor)}

    def copy(leaf: Any) -> Any:
        return leaf.detach().clone() if isinstance(leaf, Tensor) and _place(leaf) in places else leaf

    return tree_map(copy, state)


def _place(tensor: Tensor) -> tuple[str, int]:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return str(local.device), local.untyped_storage().data_ptr()


def save_sharded(checkpoint: dict[str, Any], path: Path, *, is_main: bool) -> None:
    """Write a checkpoint folder without a trainer; every rank of the default group calls it."""
    tensors, rest = split(checkpoint)
    contents = {"weights": True, "optimizers": len(tensors) - 1, "ranks": Peers().world}
    manifest = Manifest(world=Peers().world, contents=contents)
    content = writer.serialized(rest) if is_main else b""
    writer.save_folder(tensors, content, writer.serialized({}), path, manifest, Peers())


def load(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    strict: bool,
    weights_only: bool | None,
    peers: Peers | None = None,
    checksums: bool = True,
) -> dict[str, Any]:
    """Load a folder or a file into the model and the optimizers, in place; every rank calls it.

    Returns the remaining state. Raises CheckpointError for a path that is neither, for a damaged or incomplete
    checkpoint, for parameters that are missing or of another shape, and for content that could run code.
    """
    peers = peers or Peers()
    path, _ = reader.open_checkpoint(path, peers, checksums=checksums)
    state = reader.read_object(path, weights_only) if path.is_file() else reader.read_rest(path, weights_only)
    load_tensors(path, state, model, optimizers, strict=strict, peers=peers)
    return state


def load_tensors(
    path: Path,
    state: dict[str, Any],
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    strict: bool,
    peers: Peers,
) -> None:
    """Load the weights, and the states of `optimizers`, from an opened checkpoint.

    state: what the file, or the folder's meta.pt, holds; the weights are taken out of it.
    """
    if path.is_file():
        _load_file(path, state, model, optimizers, strict=strict)
    else:
        _load_folder(path, model, optimizers, strict=strict, peers=peers)


def without_progress(state: dict[str, Any], datamodule: object | None) -> dict[str, Any]:
    """What Lightning is to restore when only the weights of a checkpoint are wanted."""
    dropped = (*_PROGRESS, type(datamodule).__qualname__)
    # Lightning insists on the key.
    return {name: value for name, value in state.items() if name not in dropped} | {"lr_schedulers": []}


def _load_folder(path: Path, model: nn.Module, optimizers: Sequence[Optimizer], *, strict: bool, peers: Peers) -> None:
    metadata = reader.read_index(path)
    state = get_model_state_dict(model)
    stored = metadata.state_dict_metadata
    _require_fit(path, state, {name.removeprefix(f"{_MODEL_KEY}."): meta for name, meta in stored.items()}, strict)
    for index, _ in enumerate(optimizers):
        if not any(name.startswith(f"optimizer_{index}.") for name in stored):
            raise CheckpointError(f"The checkpoint {path} holds no state of optimizer {index}. {_WEIGHTS_ONLY}")
    if not strict:
        state = {name: value for name, value in state.items() if f"{_MODEL_KEY}.{name}" in stored}
    reader.load_tensors({_MODEL_KEY: state}, path, metadata, peers)
    set_model_state_dict(model, state, options=StateDictOptions(strict=strict))
    for index, optimizer in enumerate(optimizers):
        values = get_optimizer_state_dict(model, optimizer)
        reader.load_tensors({f"optimizer_{index}": values}, path, metadata, peers)
        set_optimizer_state_dict(model, optimizer, values)


_WEIGHTS_ONLY = (
    "Set strategy.resume_weights_only=true to start anew from its weights: new optimizers, schedulers and step count."
)


def _load_file(
    path: Path, checkpoint: dict[str, Any], model: nn.Module, optimizers: Sequence[Optimizer], *, strict: bool
) -> None:
    if "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is no training checkpoint: it has no 'state_dict'.")
    weights = checkpoint.pop("state_dict")
    _require_fit(path, model.state_dict(), weights, strict)
    states = checkpoint.get("optimizer_states", [])
    if len(states) < len(optimizers):
        raise CheckpointError(f"The checkpoint {path} holds no state of optimizer {len(states)}. {_WEIGHTS_ONLY}")
    if any(isinstance(name, int) for state in states[: len(optimizers)] for name in state["state"]):
        raise CheckpointError(
            f"The optimizer states in {path}, a file of plain Lightning, say the numbers of their parameters and not "
            f"the names, and a sharded model may have another order. {_WEIGHTS_ONLY}"
        )
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=strict))
    for optimizer, state in zip(optimizers, states, strict=False):
        if state["state"]:
            set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
            continue
        # torch looks for a tensor to learn the device from; a stateless optimizer has settings only.
        for group, stored in zip(optimizer.param_groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in stored.items() if name != "params"})


def _require_fit(path: Path, wanted: dict[str, Any], stored: dict[str, Any], strict: bool) -> None:
    shapes = {name: _shape(value) for name, value in wanted.items() if strict or name in stored}
    if misfit := misfits(shapes, {name: _shape(value) for name, value in stored.items()}):
        raise CheckpointError(
            f"The checkpoint {path} does not fit the model: {misfit}. Load it with the model config it was saved with."
        )


def _shape(value: Any) -> tuple[int, ...] | None:
    """Global shape of a tensor, or of one that an index describes; None for anything else."""
    size = value.size() if isinstance(value, Tensor) else getattr(value, "size", None)
    return None if size is None else tuple(size)
