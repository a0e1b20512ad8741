"""State that every rank has for itself: its random generators and the positions of its data loaders.

Lightning saves rank 0's view of the run; what differs from rank to rank is collected here and given back to the rank of
the same number in the same layout. In another layout a loader position that all ranks had in common is taken over;
otherwise it is lost, with a warning, and the loaders begin their epoch anew. Plain data only, so that the weights-only
loader reads it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.distributed.checkpoint.stateful import Stateful

# Where Lightning keeps the loaders' positions in its own state.
_LOADERS = "combined_loader"


def collect_rank_state(trainer: Trainer) -> dict[str, Any]:
    """This rank's state: {"random": {python, numpy, torch, device}, "loaders": a state for each stateful loader}."""
    loaders = CombinedLoader(trainer.train_dataloader).flattened
    return {
        "random": generators(trainer.strategy.root_device),
        "loaders": [loader.state_dict() for loader in loaders if isinstance(loader, Stateful)],
    }


def apply_rank_state(trainer: Trainer, state: dict[str, Any]) -> None:
    """Give this rank back the generators of `collect_rank_state`; the loaders are `use_own_loaders`'."""
    if (found := state.get("random")) is not None:
        set_generators(found, trainer.strategy.root_device)


def generators(device: torch.device) -> dict[str, Any]:
    """The states of this process's global random generators: {python, numpy, torch, device}; None for a CPU device."""
    generator = np.random.get_state(legacy=False)
    assert isinstance(generator, dict)
    return {
        "python": random.getstate(),
        "numpy": generator | {"state": generator["state"] | {"key": generator["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "device": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device),
    }


def set_generators(found: Mapping[str, Any], device: torch.device) -> None:
    """Put this process's global random generators into the states of `generators`."""
    random.setstate(found["python"])
    generator = found["numpy"]
    np.random.set_state(
        generator | {"state": generator["state"] | {"key": np.array(generator["state"]["key"], "uint32")}}
    )
    torch.set_rng_state(found["torch"])
    if device.type != "cpu" and found["device"] is not None:
        torch.get_device_module(device).set_rng_state(found["device"], device)


def use_own_loaders(checkpoint: dict[str, Any], state: Mapping[str, Any]) -> None:
    """Put this rank's loader positions in the place of rank 0's, in the checkpoint that Lightning goes on with."""
    if (loop := _fit_loop_state(checkpoint)) is not None and state.get("loaders"):
        loop[_LOADERS] = state["loaders"]


def use_common_loaders(checkpoint: dict[str, Any], states: Sequence[Mapping[str, Any]]) -> None:
    """For another layout: keep the position if all ranks had the same, or drop it with a warning.

    states: those of all ranks of the run that saved.
    """
    loop = _fit_loop_state(checkpoint)
    if loop is None or _LOADERS not in loop:
        return
    first = states[0].get("loaders", [])
    if any(not _same(first, state.get("loaders", [])) for state in states[1:]):
        del loop[_LOADERS]
        rank_zero_warn(
            "The checkpoint was saved in another layout by ranks whose data loaders stood at different places. The "
            "position in the data is lost: the loaders begin their epoch anew. A loader whose state is the same on "
            "every rank (data=text's is) keeps its place in any layout."
        )


def _fit_loop_state(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    state: dict[str, Any] | None = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict")
    return state


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_same(value, right[name]) for name, value in left.items())
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)
