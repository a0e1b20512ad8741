"""The tensor ranks of a data rank see one batch and draw the same random numbers: given to them, and looked at.

They compute parts of one model, so ranks that see other data or draw other numbers train on a mixture of both without
an error. What each tells the others goes through the process group's store, from host to host: a collective would wait
for the device.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_npu_tp.checkpoint.rank_state import generators, set_generators
from lightning_npu_tp.errors import DataError
from lightning_npu_tp.parallel.layout import Layout

# Samplers and shards differ from a pass's first batch on, what draws for each batch from the second. Later ones are
# looked at for ranks that draw apart on the way; at every 50th what that costs, a hash and a question to the store of
# about a millisecond, is nothing beside the steps between.
FIRST, EVERY = 2, 50
_MOST_LINES = 3
_COMPARED_AS_TEXT = (str, bytes, bool, int, float, complex, type(None))


class TensorRanks:
    """One rank's view of the tensor ranks that share its batches; one object for a process group's life.

    Every method is collective over those ranks, and does nothing where this one is alone.
    """

    def __init__(self, layout: Layout, rank: int, timeout: timedelta) -> None:
        first = rank // layout.tensor * layout.tensor
        self._layout, self._rank, self._timeout = layout, rank, timeout
        self._ranks = range(first, first + layout.tensor)
        self._num_told = 0
        # Of each loader that is being passed over: the last batch's number, and how many there were.
        self._passes: dict[tuple[str, int], tuple[int, int]] = {}

    def share_generators(self, device: torch.device) -> None:
        """Give this rank the random generators of the first: torch's, its device's, numpy's and Python's.

        So one seed holds for all of them, whoever set it, or none. Data ranks stay as they are: a seed that the user
        set on all of them is theirs alike, as under DDP.
        """
        if len(self._ranks) > 1:
            is_first = self._rank == self._ranks[0]
            told = self._tell(pickle.dumps(generators(device)) if is_first else b"", "the start")
            set_generators(pickle.loads(told[0]), device)

    def require_same_batch(self, batch: Any, *, stage: str, loader: int, number: int) -> None:
        """Compare some batches with those of the other tensor ranks, before they go to the device.

        stage, loader, number: say which batch it is; a number that is not above the last one's begins a pass. The
        first FIRST of a pass are looked at and then every EVERY-th. Values that lie on a device already are compared
        at the very first only, since reading them waits for it; objects of unknown classes by their class.
        Raises the same DataError on every tensor rank, which names the first that differ, and in what.
        """
        if len(self._ranks) == 1:
            return
        last, seen = self._passes.get((stage, loader), (-1, 0))
        seen = seen + 1 if number > last >= 0 else 0
        self._passes[stage, loader] = (number, seen)
        if seen >= FIRST and seen % EVERY:
            return
        found = dict(_leaves("batch", batch, wait=seen == 0))
        text = json.dumps(found, sort_keys=True).encode()
        which = f"batch {number} of {stage}{f', data loader {loader}' if loader else ''}"
        if len(set(self._tell(hashlib.blake2b(text).digest(), which))) == 1:
            return
        everyone = [json.loads(told) for told in self._tell(text, which)]
        self._refuse(everyone, which)

    def _tell(self, value: bytes, which: str) -> list[bytes]:
        """What each tensor rank told in this call, in their order."""
        store: Any = dist.distributed_c10d._get_default_store()
        self._num_told += 1
        keys = {rank: f"tensor_ranks/{self._num_told}/{rank}" for rank in self._ranks}
        store.set(keys[self._rank], value)
        deadline, pause = time.monotonic() + self._timeout.total_seconds(), 0.0002
        # Not the store's own waiting, in which no signal reaches Python: a rank whose peer has failed would hang.
        while not store.check(list(keys.values())):
            if time.monotonic() > deadline:
                late = [rank for rank, key in keys.items() if not store.check([key])]
                raise DataError(
                    f"Tensor ranks {late} did not come to {which} within {self._timeout.total_seconds():g} s, as rank "
                    f"{self._rank} did. Give all of them as many batches, or raise strategy.timeout_s."
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.01)
        told: list[bytes] = store.multi_get(list(keys.values()))
        # Whoever is here has read what was told in the call before.
        store.delete_key(f"tensor_ranks/{self._num_told - 1}/{self._rank}")
        return told

    def _refuse(self, everyone: list[dict[str, tuple[str, str]]], which: str) -> None:
        first_rank, lines = self._ranks[0], []
        for rank, other in zip(self._ranks[1:], everyone[1:], strict=True):
            for name in everyone[0].keys() | other.keys():
                (kind, _), (other_kind, _) = (found.get(name, ("missing", "")) for found in (everyone[0], other))
                if kind != other_kind:
                    lines.append(f"{name} is {other_kind} on rank {rank} and {kind} on rank {first_rank}")
                elif other.get(name) != everyone[0].get(name):
                    lines.append(f"the values of {name} ({kind}) on rank {rank} are not those on rank {first_rank}")
        shown = "; ".join(sorted(lines)[:_MOST_LINES])
        more = f"; and {len(lines) - _MOST_LINES} more" if len(lines) > _MOST_LINES else ""
        sampler = {"num_replicas": self._layout.data, "rank": first_rank // self._layout.tensor}
        raise DataError(
            f"{which[0].upper()}{which[1:]} is not the same on the tensor ranks {list(self._ranks)}: {shown}{more}. "
            f"They compute parts of one model and need one batch. Leave the sampler to Lightning, or divide the data "
            f"by trainer.strategy.distributed_sampler_kwargs, here {sampler}, and not by the rank among all ranks; "
            f"draw random numbers for data from torch's, numpy's or Python's own generators, which are the same on "
            f"these ranks once fit has begun and before it after seed_everything, or from one with a fixed seed."
        )


def _leaves(name: str, value: Any, *, wait: bool) -> Iterator[tuple[str, tuple[str, str]]]:
    """Every part of a batch: its name, and its kind (with the shape) and a digest of its values."""
    if isinstance(value, Tensor):
        yield name, (f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}", _digest_of_tensor(value, wait))
    elif isinstance(value, np.ndarray):
        yield name, (f"numpy {value.dtype} {list(value.shape)}", _digest(value.tobytes()))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}[{key!r}]", item, wait=wait)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(f"{name}[{index}]", item, wait=wait)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(f"{name}.{field.name}", getattr(value, field.name), wait=wait)
    else:
        is_text = isinstance(value, _COMPARED_AS_TEXT)
        yield name, (type(value).__name__, _digest(repr(value).encode()) if is_text else "")


def _digest_of_tensor(tensor: Tensor, wait: bool) -> str:
    if tensor.layout != torch.strided or tensor.is_meta or not (tensor.device.type == "cpu" or wait):
        return ""
    return _digest(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _digest(values: bytes) -> str:
    return hashlib.blake2b(values, digest_size=16).hexdigest()
