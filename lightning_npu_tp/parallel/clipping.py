"""Gradient norms and clipping over shards: every parameter counts once, whatever its placement.

torch's own clipping refuses plain gradients beside DTensors and DTensors of two meshes, and here
both are the rule. The local parts are measured in one sweep, then summed over the ranks that hold
the rest: one all-reduce for each set of ranks, not one per parameter. Nothing is read on the host,
and all ranks end with the same norm. Gradients must be complete: this module reduces none.

A parameter that is not sharded counts as replicated, so it must be equal on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_npu_tp.errors import ConfigError

# Over which ranks the rest of a parameter lies: one tuple of ranks per sharding mesh axis. Empty: replicated.
_Ranks = tuple[tuple[int, ...], ...]
# torch.nn.utils.clip_grad_norm_ uses the same, so that one process and many agree to the last digit.
_EPSILON = 1e-6


@torch.no_grad()
def total_grad_norm(parameters: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """Norm of all gradients together, as if the parameters were whole.

    parameters: those of the optimizer, in the same order on every rank; DTensors on any meshes, or
    plain tensors equal on all ranks. A gradient that is None counts as zero.
    norm_type:  p of the p-norm, positive; math.inf for the largest magnitude.
    Returns a scalar on the parameters' device, the same on every rank, in float32 or, if a parameter
    is float64, in float64; NaN gradients give NaN or infinity. Collective: every rank must call it.
    Raises ConfigError for a norm type that is no norm and for a gradient that is not yet reduced.
    """
    if not norm_type > 0:
        raise ConfigError(f"norm_type={norm_type} is not the p of a norm. Use 2.0, another positive number or inf.")
    parts: dict[_Ranks, list[Tensor]] = {}
    groups: dict[_Ranks, list[dist.ProcessGroup]] = {}
    # Of the parameters, not the gradients: a rank without gradients takes part in the same all-reduce.
    dtype, device = torch.float32, torch.device("cpu")
    for parameter in parameters:
        dtype, device = torch.promote_types(dtype, parameter.dtype), parameter.device
        ranks, its_groups = _shared_with(parameter)
        groups.setdefault(ranks, its_groups)
        gradient = _local_gradient(parameter)
        if gradient is not None and gradient.numel():
            parts.setdefault(ranks, []).append(gradient)
    total = torch.zeros((), dtype=dtype, device=device)
    for ranks, its_groups in groups.items():
        share = _power_sum(parts.get(ranks, []), norm_type, dtype, device)
        for group in its_groups:
            dist.all_reduce(share, op=dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM, group=group)
        total = torch.maximum(total, share) if math.isinf(norm_type) else total + share
    return total if math.isinf(norm_type) else total.pow(1.0 / norm_type)


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale all gradients in place so that their total norm is at most `max_norm`; return the norm before.

    Parameters, result and errors as `total_grad_norm`; the formula is torch's. Collective.
    """
    parameters = list(parameters)
    total = total_grad_norm(parameters, norm_type)
    factor = torch.clamp(max_norm / (total + _EPSILON), max=1.0)
    for gradients in _by_dtype(parameters):
        torch._foreach_mul_(gradients, factor)
    return total


@torch.no_grad()
def clip_grad_value_(parameters: Iterable[Tensor], clip_value: float) -> None:
    """Clamp every gradient's elements in place to [-clip_value, clip_value]. Communicates nothing."""
    for gradients in _by_dtype(parameters):
        torch._foreach_clamp_min_(gradients, -clip_value)
        torch._foreach_clamp_max_(gradients, clip_value)


@torch.no_grad()
def local_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The parts of the gradients that lie here, as plain tensors sharing their memory; None is left out.

    Raises ConfigError for a DTensor gradient that is partial, since scaling or clamping the parts of a
    sum is not the same as doing it to the sum.
    """
    gradients = (_local_gradient(parameter) for parameter in parameters)
    return [gradient for gradient in gradients if gradient is not None]


def _local_gradient(parameter: Tensor) -> Tensor | None:
    gradient = parameter.grad
    if isinstance(gradient, DTensor):
        if any(placement.is_partial() for placement in gradient.placements):
            raise ConfigError(
                f"a gradient of shape {tuple(gradient.shape)} has the placements {gradient.placements}: it is a "
                f"partial sum. Reduce it (gradient.redistribute) before clipping."
            )
        return gradient.to_local()
    return gradient


def _by_dtype(parameters: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Local gradients in lists of one dtype, which the foreach kernels need to be fast."""
    lists: dict[torch.dtype, list[Tensor]] = {}
    for gradient in local_gradients(parameters):
        lists.setdefault(gradient.dtype, []).append(gradient)
    return lists.values()


def _shared_with(parameter: Tensor) -> tuple[_Ranks, list[dist.ProcessGroup]]:
    """The ranks that hold the other parts of `parameter`, and the process groups that reach them."""
    if not isinstance(parameter, DTensor):
        return (), []
    mesh = parameter.device_mesh
    # Not `is_shard`, which says no to the strided shards that FSDP makes of tensor-parallel parameters.
    axes = [
        axis
        for axis, placement in enumerate(parameter.placements)
        if not placement.is_replicate() and not placement.is_partial() and mesh.size(axis) > 1
    ]
    world = dist.group.WORLD
    if world is not None and math.prod(mesh.size(axis) for axis in axes) == world.size() > 1:
        return (tuple(range(world.size())),), [world]
    # Ranks and not groups are the key: the dense and the expert mesh make groups of the same ranks.
    groups = [mesh.get_group(axis) for axis in axes]
    return tuple(sorted(tuple(dist.get_process_group_ranks(group)) for group in groups)), groups


def _power_sum(gradients: list[Tensor], norm_type: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sum of |x|^p over the elements of all gradients, or the largest |x|; a scalar in `dtype`."""
    norms: list[Tensor] = []
    for kind in {gradient.dtype for gradient in gradients}:
        same = [gradient for gradient in gradients if gradient.dtype == kind]
        norms += torch._foreach_norm(same, norm_type, dtype=torch.promote_types(kind, torch.float32))
    if not norms:
        return torch.zeros((), dtype=dtype, device=device)
    stacked = torch.stack([norm.to(dtype) for norm in norms])
    # A maximum over ranks may lose a NaN, and then they would not agree; infinity survives it.
    return (
        stacked.max().nan_to_num(nan=math.inf, posinf=math.inf)
        if math.isinf(norm_type)
        else stacked.pow(norm_type).sum()
    )
