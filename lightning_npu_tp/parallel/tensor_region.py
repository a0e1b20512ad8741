"""How the tensor ranks of one decoder share it: what frames the work on split parameters.

A layer enters a region with activations that all ranks know, works there on its own part of the
parameters, and leaves with a sum. Outside, activations are whole on every rank, or, with sequence
parallelism, each rank keeps a slice of the positions: then norms, residuals and the router run on a
slice, entering gathers and leaving scatters. Layers call the four methods here and know neither.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.parallel.collectives import copy_to_group, group_size, reduce_from_group
from lightning_npu_tp.parallel.layout import DATA_AXIS, EXPERT_REPLICA_AXIS, Groups
from lightning_npu_tp.parallel.sequence import gather_sequence, reduce_to_sequence, slice_sequence

_SHARED_OVER_DATA = (DATA_AXIS, EXPERT_REPLICA_AXIS)


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter, differentiable; a plain tensor is its own part."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def tensor_part(parameter: Tensor) -> Tensor:
    """This tensor rank's part of a parameter, to compute with, differentiable; a plain tensor is its own part.

    Raises ConversionError for a parameter that is still shared over data ranks: its part would be taken for the whole,
    or its gradient stay that of one data rank.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    for index, (axis, placement) in enumerate(zip(mesh.mesh_dim_names or (), parameter.placements, strict=False)):
        has_gradient = parameter.requires_grad and torch.is_grad_enabled()
        is_shared = axis in _SHARED_OVER_DATA and mesh.size(index) > 1
        if is_shared and (has_gradient or not placement.is_replicate()):
            raise ConversionError(
                f"A parameter of shape {tuple(parameter.shape)} is shared over {mesh.size(index)} data ranks and was "
                f"used outside of the forward that gathers it. Call the module that it belongs to, as module(...), "
                f"neither a copy of it nor another of its methods, or compute with the parameter itself, as if whole."
            )
    return parameter.to_local()


class Region:
    """Enters and leaves the tensor-parallel regions of one model; its modules share the object, which is whole.

    groups:            process groups, looked up at each use.
    sequence_parallel: whether activations outside of regions are slices of the sequence, in forwards
                       that allow it (`length_to_slice`).
    length:            positions of the sequences of which every rank keeps a slice outside of regions; None where
                       activations are whole. Fixed: `sliced` makes another region.
    """

    def __init__(self, groups: Groups, *, sequence_parallel: bool = False) -> None:
        self.groups = groups
        self.sequence_parallel = sequence_parallel
        self.length: int | None = None

    @property
    def is_sliced(self) -> bool:
        """Whether activations outside of regions are slices of the sequence."""
        return self.length is not None

    def sliced(self, length: int | None) -> Region:
        """This region for one forward pass over sequences of `length` positions; None keeps them whole."""
        region = copy.copy(self)
        region.length = length
        return region

    def length_to_slice(self, length: int, *, has_cache: bool) -> int | None:
        """What to hand to `sliced` for a forward over `length` positions.

        None, which is whole, without sequence parallelism, with a cache of earlier positions, and for
        sequences so short that a rank would have none.
        """
        ranks = group_size(self.groups.tensor())
        return length if self.sequence_parallel and 1 < ranks <= length and not has_cache else None

    def enter(self, *tensors: Tensor) -> Any:
        """Make activations ready for each rank's own part of the work.

        tensors: [B, S or this rank's slice, …], known alike to all ranks. Returns [B, S, …] each.
        Gradient: the ranks' partial gradients, summed.
        """
        group = self.groups.tensor()
        if self.length is None:
            return copy_to_group(*tensors, group=group)
        gathered = tuple(gather_sequence(tensor, self.length, group) for tensor in tensors)
        return gathered if len(gathered) > 1 else gathered[0]

    def leave(self, partial: Tensor) -> Tensor:
        """Sum the ranks' partial results [B, S, …]; returns [B, S or this rank's slice, …]."""
        group = self.groups.tensor()
        return reduce_from_group(partial, group) if self.length is None else reduce_to_sequence(partial, group)

    def share(self, *tensors: Tensor) -> Any:
        """Use inside of the region what replicated modules made of its input.

        Without slices they ran outside, on whole activations, and their results enter here. With
        slices they ran on what had entered already, and their parameters' gradients are summed
        (`weight`): nothing is left to do.
        """
        if self.length is None:
            return copy_to_group(*tensors, group=self.groups.tensor())
        return tensors if len(tensors) > 1 else tensors[0]

    def outside(self, hidden: Tensor, entered: Tensor) -> Tensor:
        """What replicated modules of a region take as input: see `share`."""
        return hidden if self.length is None else entered

    def weight(self, owner: nn.Module, name: str = "weight") -> Any:
        """A replicated parameter of `owner`, local, for a module that sees a slice, or works inside with `share`.

        None where the owner has none. Gradient: complete on every rank.
        """
        parameter = getattr(owner, name)
        if parameter is None:
            return None
        return tensor_part(parameter) if self.length is None else self.weight_inside(owner, name)

    def weight_inside(self, owner: nn.Module, name: str = "weight") -> Tensor:
        """A replicated parameter of `owner`, local, that every rank applies to its own part in a region.

        Gradient: the ranks' partial gradients, summed.
        """
        return copy_to_group(tensor_part(getattr(owner, name)), group=self.groups.tensor())

    def total_inside(self, partial: Tensor) -> Tensor:
        """Sum the ranks' partial numbers inside of a region, for each rank's own use.

        Gradient: the ranks' partial gradients, summed.
        """
        group = self.groups.tensor()
        return copy_to_group(reduce_from_group(partial, group), group=group)

    def slice(self, whole: Tensor) -> Tensor:
        """This rank's slice of [B, S, …] that every rank holds whole; unchanged in a forward that is not sliced."""
        return whole if self.length is None else slice_sequence(whole, self.groups.tensor())

    def __deepcopy__(self, memo: dict[int, object]) -> Region:
        return self
