"""The gradient scaler over ranks.

Catches: a rank that skips a step alone, after which the weights differ for ever; gradients that are
unscaled once per copy; and a rank without gradients that leaves its peers waiting.
"""

from __future__ import annotations

import math

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from lightning_npu_tp.trainer.precision import AgreedGradScaler

SCALE = 2.0**16


def step(scaler, optimizer, gradients):
    """One scaled step with given (unscaled) local gradients; returns the new scale."""
    scaler.scale(torch.zeros(()))
    for parameter, gradient in gradients:
        if gradient is None:
            parameter.grad = None
        elif isinstance(parameter, DTensor):
            parameter.grad = DTensor.from_local(gradient * scaler.get_scale(), parameter.device_mesh, [Shard(0)])
        else:
            parameter.grad = gradient * scaler.get_scale()
    scaler.unscale_(optimizer)
    unscaled = [parameter.grad for parameter, _ in gradients]
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale(), unscaled


def check_steps(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    shard = torch.nn.Parameter(DTensor.from_local(torch.zeros(2), mesh, [Shard(0)]))
    plain = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([shard, plain], lr=1.0, foreach=False)
    scaler = AgreedGradScaler("cpu")

    # A good step: the local parts are unscaled in place, once.
    scale, (sharded_gradient, plain_gradient) = step(
        scaler, optimizer, [(shard, torch.full((2,), rank + 1.0)), (plain, torch.ones(3))]
    )
    assert scale == SCALE
    assert sharded_gradient.to_local().tolist() == [rank + 1.0] * 2 and plain_gradient.tolist() == [1.0] * 3
    assert shard.to_local().tolist() == [-(rank + 1.0)] * 2 and plain.tolist() == [-1.0] * 3

    # Rank 1's shard overflows: nobody steps, everybody's scale is halved.
    bad = math.inf if rank == 1 else 1.0
    scale, _ = step(scaler, optimizer, [(shard, torch.tensor([1.0, bad])), (plain, torch.ones(3))])
    assert scale == SCALE / 2
    assert shard.to_local().tolist() == [-(rank + 1.0)] * 2 and plain.tolist() == [-1.0] * 3

    # Rank 0 has no gradient at all, and rank 1's is NaN.
    nothing = [(shard, None), (plain, None)]
    something = [(shard, torch.tensor([math.nan, 1.0])), (plain, torch.ones(3))]
    scale, _ = step(scaler, optimizer, nothing if rank == 0 else something)
    assert scale == SCALE / 4
    return plain.tolist()


def test_one_ranks_overflow_is_everybodys(on_ranks):
    assert on_ranks(check_steps, 2) == [[-1.0] * 3] * 2
