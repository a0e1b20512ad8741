"""Which part of each parameter of a sharded model this rank holds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_npu_tp.parallel.layout import EXPERT_AXIS, TENSOR_AXIS, Meshes
from lightning_npu_tp.parallel.plan import Rule, chunk_bounds
from lightning_npu_tp.weights.load import Target


def mesh_of(rule: Rule, meshes: Meshes) -> DeviceMesh:
    """The one axis that a rule places its parameter on."""
    return meshes.expert[EXPERT_AXIS] if rule.axis == "expert" else meshes.dense[TENSOR_AXIS]


def targets_of(
    model: nn.Module,
    names: Sequence[str],
    shapes: dict[str, tuple[int, ...]],
    tied: dict[str, str],
    rules: dict[str, Rule],
    meshes: Meshes,
    own_buffers: set[str],
) -> list[Target]:
    """Every parameter and persistent buffer, with the part of it that this rank holds.

    own_buffers: those that transformers' model has; files may lack the others.
    """
    found = []
    for first in dict.fromkeys(tied.get(name, name) for name in names):
        aliases = tuple(name for name in names if tied.get(name, name) == first)
        parameter = model.get_parameter(first)
        assert isinstance(parameter, DTensor)
        bounds = local_bounds(parameter, rules[first], shapes[first], mesh_of(rules[first], meshes))
        found.append(Target(aliases, shapes[first], bounds, parameter.to_local().detach()))
    for name, buffer in model.state_dict().items():
        if name not in shapes:
            whole = tuple((0, size) for size in buffer.shape)
            found.append(Target((name,), tuple(buffer.shape), whole, buffer, optional=name not in own_buffers))
    return found


def local_bounds(
    parameter: DTensor, rule: Rule, shape: tuple[int, ...], mesh: DeviceMesh
) -> tuple[tuple[int, int], ...]:
    """First and one past the last index, per dimension, of what this rank holds of a parameter of global `shape`."""
    bounds = [(0, size) for size in shape]
    if rule.dim is not None:
        bounds[rule.dim] = chunk_bounds(shape[rule.dim], mesh.get_local_rank(), mesh.size())
    if parameter.device_mesh.ndim > 1 and (dim := getattr(parameter.placements[0], "dim", None)) is not None:
        # FSDP cuts a rank's part once more, over the first axis of the mesh.
        coordinate = parameter.device_mesh.get_coordinate()
        assert coordinate is not None
        start, stop = bounds[dim]
        first, last = chunk_bounds(stop - start, coordinate[0], parameter.device_mesh.size(0))
        bounds[dim] = (start + first, start + last)
    held = tuple(stop - start for start, stop in bounds)
    assert held == tuple(parameter.to_local().shape), f"{held} is not {tuple(parameter.to_local().shape)}"
    return tuple(bounds)
