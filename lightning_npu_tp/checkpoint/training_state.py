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

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
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
from lightning_npu_tp.optim.exchange import give_halves, take_masters

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
    """This rank's shards of an optimizer's state, by parameter name, on the CPU; {} of one that has no state dict."""
    if not optimizer.state_dict():
        # Lightning's stand-in where `configure_optimizers` returned None.
        return {}
    is_new = not optimizer.state
    found = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(cpu_offload=True))
    if is_new:
        # torch has made its state by a step with zero gradients, which Adam would count as one of training.
        optimizer.state.clear()
        found["state"] = {}
    return found


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
    path, manifest = reader.open_checkpoint(path, peers, checksums=checksums)
    state = reader.read_object(path, weights_only) if path.is_file() else reader.read_rest(path, weights_only)
    load_tensors(path, state, model, optimizers, strict=strict, peers=peers)
    reader.require_unchanged(path, manifest, peers)
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
    stateful = [(index, optimizer) for index, optimizer in enumerate(optimizers) if optimizer.state_dict()]
    for index, _ in stateful:
        if not any(name.startswith(f"optimizer_{index}.") for name in stored):
            raise CheckpointError(f"The checkpoint {path} holds no state of optimizer {index}. {_WEIGHTS_ONLY}")
    if not strict:
        state = {name: value for name, value in state.items() if f"{_MODEL_KEY}.{name}" in stored}
    reader.load_tensors({_MODEL_KEY: state}, path, metadata, peers)
    set_model_state_dict(model, state, options=StateDictOptions(strict=strict))
    for index, optimizer in stateful:
        values = _room_for(f"optimizer_{index}", metadata, model, optimizer)
        reader.load_tensors({f"optimizer_{index}": values}, path, metadata, peers)
        _exchange_masters(values["state"], model, optimizer, path, metadata, peers)
        _set_optimizer(path, values, model, optimizer, strict=strict)


def _exchange_masters(
    states: dict[str, Any], model: nn.Module, optimizer: Optimizer, path: Path, metadata: Metadata, peers: Peers
) -> None:
    """Where a run goes on in another precision: make float32 weights of the checkpoint's halves, or halves of those."""
    parameters = dict(model.named_parameters())
    for name, master in take_masters(states, parameters, optimizer).items():
        with torch.no_grad():
            parameters[name].copy_(master)

    def read(name: str) -> Tensor | None:
        stored = metadata.state_dict_metadata.get(f"{_MODEL_KEY}.{name}")
        if not isinstance(stored, TensorStorageMetadata) or stored.properties.dtype.itemsize < 4:
            return None
        wide = {name: torch.empty_like(parameters[name], dtype=torch.float32, requires_grad=False)}
        reader.load_tensors({_MODEL_KEY: wide}, path, metadata, peers)
        return wide[name]

    give_halves(states, parameters, optimizer, read)


def _room_for(key: str, metadata: Metadata, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What a folder holds of an optimizer, in its own structure, with tensors to load into.

    As torch's optimizers load: settings and states are the checkpoint's, also where this run has more or fewer of them
    (a scheduler, amsgrad, a parameter that had no gradient yet).
    """
    fresh: Any = get_optimizer_state_dict(model, optimizer)
    parameters = dict(model.named_parameters())
    state, groups = dict[str, Any](), list[dict[str, Any]]()
    for name, stored in metadata.state_dict_metadata.items():
        match (metadata.planner_data or {}).get(name, ()):
            case (start, "param_groups", int(number), setting) if start == key:
                groups += [{} for _ in range(number + 1 - len(groups))]
                groups[number][setting] = _empty(stored, None)
            case (start, "state", parameter, *entry) if start == key and parameter in parameters:
                place, there = state.setdefault(parameter, {}), fresh["state"].get(parameter, {})
                for step in entry[:-1]:
                    place, there = place.setdefault(step, {}), there.get(step, {})
                has = there.get(entry[-1])
                place[entry[-1]] = _empty(stored, parameters[parameter]) if has is None else has
    return {"state": state, "param_groups": groups}


def _empty(stored: Any, parameter: Tensor | None) -> Tensor | None:
    """A tensor for what an index describes, sharded as the parameter if it is of its size; None for anything else."""
    if not isinstance(stored, TensorStorageMetadata):
        return None
    dtype = stored.properties.dtype
    if parameter is not None and parameter.shape == stored.size:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(stored.size, dtype=dtype)


def _set_optimizer(
    path: Path, values: dict[str, Any], model: nn.Module, optimizer: Optimizer, *, strict: bool, whole: bool = False
) -> None:
    """Give an optimizer the settings and states of a checkpoint, by the names of its parameters.

    whole: every tensor is here in one piece.
    Raises CheckpointError where the two are not of the same parameters.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    own = {names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]}
    theirs = {name for group in values["param_groups"] for name in group["params"]}
    if strict and own != theirs:
        only = "; ".join(
            f"{_first(part)} only {where}" for part, where in ((theirs - own, "there"), (own - theirs, "here")) if part
        )
        raise CheckpointError(
            f"The optimizer in {path} trains other parameters than this run's: {only}. Give the optimizer the same "
            f"ones before the checkpoint is loaded, or start anew from its weights (strategy.resume_weights_only=true)."
        )
    set_optimizer_state_dict(model, optimizer, values, options=StateDictOptions(full_state_dict=whole, strict=False))


def _first(names: set[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


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
    named = [
        _named(path, state, model, optimizer, weights) for optimizer, state in zip(optimizers, states, strict=False)
    ]
    for optimizer, state in zip(optimizers, named, strict=True):
        weights |= take_masters(state.get("state", {}), weights, optimizer)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=strict))
    for optimizer, state in zip(optimizers, named, strict=True):
        if state.get("state"):
            _set_optimizer(path, state, model, optimizer, strict=strict, whole=True)
        # torch looks for a tensor to learn the device from; a stateless optimizer has settings only. And it keeps
        # settings that the file has not.
        for group, stored in zip(optimizer.param_groups, state.get("param_groups", []), strict=False):
            for setting in group.keys() - stored.keys():
                del group[setting]
            group.update({name: value for name, value in stored.items() if name != "params"})


def _named(
    path: Path, state: dict[str, Any], model: nn.Module, optimizer: Optimizer, weights: dict[str, Any]
) -> dict[str, Any]:
    """An optimizer's state with its parameters' names for the numbers that plain Lightning saves.

    torch's optimizers number their parameters in order. Here that means the same one only where the file's weights come
    in the order of the model's, and each state has its parameter's size.
    Raises CheckpointError otherwise.
    """
    numbers = [number for group in state.get("param_groups", []) for number in group["params"]]
    if not any(isinstance(number, int) for number in numbers):
        return state
    parameters = dict(model.named_parameters())
    own = {id(parameter): name for name, parameter in parameters.items()}
    names = [own.get(id(parameter), "") for group in optimizer.param_groups for parameter in group["params"]]
    sizes = [len(group["params"]) for group in state["param_groups"]]
    fits = sizes == [len(group["params"]) for group in optimizer.param_groups]
    fits = fits and list(parameters) == [name for name in weights if name in parameters]
    name_of = dict(zip(numbers, names, strict=False))
    fits = fits and all(
        not isinstance(value, Tensor) or value.numel() == 1 or value.shape == parameters[name_of[number]].shape
        for number, entries in state["state"].items()
        for value in entries.values()
    )
    if not fits:
        raise CheckpointError(
            f"The optimizer states in {path}, a file of plain Lightning, say the numbers of their parameters and not "
            f"the names, and this run's optimizer has another order or other groups. {_WEIGHTS_ONLY}"
        )
    groups = [group | {"params": [name_of[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {name_of[number]: entries for number, entries in state["state"].items()}, "param_groups": groups}


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
