"""The weights of a live, sharded model as a source for an export: rank 0 asks, the ranks that hold a part send it.

Rank 0 runs the export as it would over a checkpoint; each part that it reads is announced to the others, who send what
they have of it. So nothing is ever gathered that rank 0 has not room for, and the export's code is one. An error on
rank 0 ends the serving on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_npu_tp.errors import CheckpointError
from lightning_npu_tp.models.file_names import Bounds, Piece
from lightning_npu_tp.weights.sources import assembled

T = TypeVar("T")


class LiveSource:
    """A module's weights as a `TensorSource`; every rank makes one, rank 0 reads, the others serve.

    module: its parameters are DTensors of any meshes, or plain and alike on all ranks.
    device: on which the process group moves tensors.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        # Not module.state_dict(): FSDP may have whole parameters in place of its shards just now.
        state = get_model_state_dict(module)
        self._tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self._device = device
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}
        self._together = dist.is_initialized() and dist.get_world_size() > 1
        self.is_main = not self._together or dist.get_rank() == 0
        self._own = {name: _bounds(tensor) for name, tensor in self._tensors.items()}
        every: list[dict[str, Bounds]] = [self._own]
        if self._together:
            every = [{}] * dist.get_world_size()
            dist.all_gather_object(every, self._own)
        # Bounds -> the first rank that holds them: replicas are asked once.
        self._owners: dict[str, dict[Bounds, int]] = {name: {} for name in self._own}
        for rank, parts in enumerate(every):
            for name, bounds in parts.items():
                self._owners[name].setdefault(bounds, rank)

    def run(self, work: Callable[[], T]) -> T | None:
        """`work` on rank 0, which may read; returns its result there and None elsewhere; an error is everybody's."""
        if not self._together:
            return work()
        if not self.is_main:
            self._serve()
            return None
        try:
            result = work()
        except Exception as error:
            _tell(("failed", f"{type(error).__name__}: {error}"))
            raise
        _tell(("done", ""))
        return result

    def read(self, name: str, bounds: Bounds) -> Tensor:
        """The part of a tensor within `bounds`; for rank 0, inside of `run`."""
        if self._together:
            _tell((name, bounds))

        def from_rank(rank: int, inside: Bounds) -> Tensor:
            return self._part(name, inside) if rank == 0 else self._receive(name, inside, rank)

        return assembled(name, bounds, self.dtypes[name], self._owners[name].items(), from_rank, whose="The ranks")

    def _part(self, name: str, inside: Bounds) -> Tensor:
        tensor = self._tensors[name]
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return local.detach()[tuple(slice(*pair) for pair in inside)]

    def _receive(self, name: str, inside: Bounds, rank: int) -> Tensor:
        part = torch.empty([stop - start for start, stop in inside], dtype=self.dtypes[name], device=self._device)
        # As bytes: not every backend sends every dtype.
        dist.recv(part.reshape(-1).view(torch.uint8), src=rank)
        return part

    def _serve(self) -> None:
        me = dist.get_rank()
        while True:
            what, bounds = _hear()
            if what == "done":
                return
            if what == "failed":
                raise CheckpointError(f"The export failed on rank 0: {bounds}")
            if self._owners[what].get(self._own[what]) != me:
                continue
            if (overlap := Piece(what, (), self._own[what]).overlap(bounds)) is not None:
                part = self._part(what, overlap[0]).to(self._device).contiguous()
                dist.send(part.reshape(-1).view(torch.uint8), dst=0)


def _bounds(tensor: Tensor) -> Bounds:
    """Where this rank's part of a tensor lies in it."""
    if not isinstance(tensor, DTensor):
        return tuple((0, size) for size in tensor.shape)
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple((offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


def _tell(message: tuple) -> None:
    dist.broadcast_object_list([message], src=0)


def _hear() -> tuple:
    box: list = [None]
    dist.broadcast_object_list(box, src=0)
    return box[0]
