"""Gradient norms and clipping over shards against one process that holds the whole gradients.

Catches: a parameter counted once per rank that holds a copy, a shard left out, two meshes mixed up, a
rank without a gradient that leaves its peers waiting, and an all-reduce for every parameter.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.parallel.clipping import clip_grad_norm_, clip_grad_value_, total_grad_norm
from lightning_npu_tp.tools.testing.operators import CountOperators
from lightning_npu_tp.tools.testing.reference import assert_close_relative

TOLERANCE = 1e-14


def whole_gradients(shapes):
    generator = torch.Generator().manual_seed(5)
    # Very different sizes: one left out or counted twice cannot hide.
    return [
        (index + 1) ** 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for index, shape in enumerate(shapes)
    ]


def sharded(whole, mesh, placements):
    """A parameter whose gradient is `whole`, distributed."""
    parameter = torch.nn.Parameter(distribute_tensor(torch.zeros_like(whole), mesh, placements))
    # Cloned: a replicated DTensor shares its tensor's memory.
    parameter.grad = distribute_tensor(whole.clone(), mesh, placements)
    return parameter


def mixture():
    """Every kind of placement that a run can have, on three meshes, and plain tensors among them."""
    dense = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    experts = init_device_mesh("cpu", (1, 4), mesh_dim_names=("replica", "expert"))
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "expert"))
    kinds = [
        ((6, 4), dense, [Replicate(), Replicate()]),
        ((4, 6), dense, [Replicate(), Shard(0)]),
        ((5, 3), dense, [Replicate(), Shard(1)]),
        ((4, 4), dense, [Shard(0), Shard(1)]),
        ((4, 2), dense, [Shard(0), Replicate()]),
        ((8, 3, 2), experts, [Replicate(), Shard(0)]),
        # Three experts for four ranks: the last one holds nothing.
        ((3, 2, 2), experts, [Replicate(), Shard(0)]),
        ((4, 2, 2), pairs, [Replicate(), Shard(0)]),
        ((3,), None, None),
    ]
    whole = whole_gradients([shape for shape, _, _ in kinds])
    parameters = []
    for gradient, (_, mesh, placements) in zip(whole, kinds, strict=True):
        if mesh is None:
            parameters.append(torch.nn.Parameter(torch.zeros_like(gradient)))
            parameters[-1].grad = gradient.clone()
        else:
            parameters.append(sharded(gradient, mesh, placements))
    return whole, parameters


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_mixture(rank, world_size, norm_type):
    whole, parameters = mixture()
    expected = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in whole]), norm_type)
    total = total_grad_norm(parameters, norm_type)
    assert total.dtype == torch.float64
    assert_close_relative(total, expected, TOLERANCE, "norm")
    clip_grad_norm_(parameters, 0.5, norm_type)
    for gradient, parameter in zip(whole, parameters, strict=True):
        assert_close_relative(full(parameter.grad), gradient * (0.5 / (expected + 1e-6)), TOLERANCE, "clipped")
    clip_grad_value_(parameters, 0.01)
    for gradient, parameter in zip(whole, parameters, strict=True):
        clamped = (gradient * (0.5 / (expected + 1e-6))).clamp(-0.01, 0.01)
        assert_close_relative(full(parameter.grad), clamped, TOLERANCE, "clamped")
    return total.item()


def check_reductions(rank, world_size):
    _, parameters = mixture()
    with CountOperators() as counter:
        clip_grad_norm_(parameters, 1.0)
    assert [str(sighting) for sighting in counter.found()] == []
    return counter.counts["c10d::allreduce_"]


def check_missing(rank, world_size):
    """Rank 1's experts got no token, so that its gradient is None; in float64 and float32 parameters."""
    mesh = init_device_mesh("cpu", (world_size,))
    for dtype in (torch.float64, torch.float32):
        local = torch.full((2, 2), rank + 1.0, dtype=dtype)
        parameter = torch.nn.Parameter(DTensor.from_local(torch.zeros_like(local), mesh, [Shard(0)]))
        if rank != 1:
            parameter.grad = DTensor.from_local(local, mesh, [Shard(0)])
        expected = torch.tensor(math.sqrt(sum(4 * (r + 1) ** 2 for r in range(world_size) if r != 1)))
        assert_close_relative(clip_grad_norm_([parameter], 1.0), expected, 1e-6, "norm")
        assert total_grad_norm([parameter], math.inf).dtype == dtype


def check_nan(rank, world_size):
    """A NaN in one rank's shard: all ranks must see it."""
    mesh = init_device_mesh("cpu", (world_size,))
    local = torch.ones(2)
    parameter = torch.nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)]))
    parameter.grad = DTensor.from_local(torch.tensor([1.0, math.nan if rank == 1 else 2.0]), mesh, [Shard(0)])
    return [math.isfinite(total_grad_norm([parameter], p).item()) for p in (2.0, math.inf)]


def check_partial(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    parameter = torch.nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Replicate()]))
    parameter.grad = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    for clip in (clip_grad_norm_, clip_grad_value_):
        with pytest.raises(ConfigError, match="partial sum. Reduce it"):
            clip([parameter], 1.0)


def check_fully_shard(rank, world_size):
    """FSDP2 over the data axis of tensor-parallel parameters: shards of shards, with strides."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    whole = torch.nn.Linear(6, 8, bias=False, dtype=torch.float64)
    layer = torch.nn.Linear(6, 8, bias=False, dtype=torch.float64)
    layer.weight = torch.nn.Parameter(distribute_tensor(whole.weight.detach(), mesh["tensor"], [Shard(0)]))
    layer = fully_shard(layer, mesh=mesh["data"])
    inputs = torch.randn(3, 6, dtype=torch.float64)
    whole(inputs).pow(2).sum().backward()
    replicated = DTensor.from_local(inputs, mesh["tensor"], [Replicate()])
    layer(replicated).pow(2).sum().backward()
    strided = type(layer.weight.placements[0]).__name__
    expected = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
    assert_close_relative(clip_grad_norm_(layer.parameters(), 0.5), expected, TOLERANCE, "norm")
    assert_close_relative(layer.weight.grad.full_tensor(), whole.weight.grad, TOLERANCE, "clipped")
    return strided


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_a_mixture_of_placements_and_meshes_clips_like_one_process(on_ranks, norm_type):
    totals = on_ranks(check_mixture, 4, norm_type)
    assert totals == [totals[0]] * 4, "every rank has the very same norm"


def test_there_is_one_all_reduce_for_each_set_of_ranks(on_ranks):
    # The tensor pairs (shared with the expert pairs), the data pairs, and all four ranks.
    assert on_ranks(check_reductions, 4) == [3] * 4


def test_a_rank_without_a_gradient_takes_part(on_ranks):
    on_ranks(check_missing, 2)


def test_all_ranks_see_a_bad_gradient_of_one(on_ranks):
    assert on_ranks(check_nan, 2) == [[False, False]] * 2


def test_a_gradient_that_is_not_reduced_is_refused(on_ranks):
    on_ranks(check_partial, 2)


def test_shards_that_fsdp_makes_of_tensor_parallel_parameters_count_once(on_ranks):
    assert on_ranks(check_fully_shard, 4) == ["_StridedShard"] * 4


def test_a_world_of_one_communicates_nothing(on_ranks):
    assert on_ranks(check_alone, 1) == [0]


def check_alone(rank, world_size):
    assert dist.get_world_size() == 1
    mesh = init_device_mesh("cpu", (1, 1))
    parameter = sharded(torch.tensor([3.0, 4.0]), mesh, [Shard(0), Replicate()])
    with CountOperators() as counter:
        total = clip_grad_norm_([parameter], 1.0)
    assert total.item() == 5.0
    return counter.counts["c10d::allreduce_"]
