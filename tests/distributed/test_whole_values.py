"""Expressions over one sharded parameter: value, gradient and the gradient's placements.

Catches a number that is one rank's part, a gradient that DTensor's own formula gets wrong or leaves replicated or
partial, which FSDP, clipping and optimizers would take for a shard, and rows that data and tensor ranks do not divide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_npu_tp.parallel.layout import DATA_AXIS, TENSOR_AXIS
from lightning_npu_tp.parallel.whole_values import WholeValues

HIDDEN = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)
EXPRESSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "squares": lambda w: w.pow(2).sum(),
    "norm": lambda w: w.norm(),
    "torch.norm": lambda w: torch.norm(w),
    "1-norm": lambda w: torch.linalg.vector_norm(w, 1),
    "largest": lambda w: w.norm(math.inf),
    "mean": lambda w: w.mean(),
    "variance": lambda w: w.var(),
    "least": lambda w: w.min(),
    "one element": lambda w: w[1, 2],
    "sums of rows": lambda w: w.sum(0).pow(2).sum(),
    "beside a plain tensor": lambda w: F.linear(HIDDEN, w).pow(2).mean(),
    "beside a loss": lambda w: HIDDEN.mean() + w.exp().sum().log(),
}


def compute(rank: int, world_size: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=(DATA_AXIS, TENSOR_AXIS))
    full = torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layer = nn.Linear(6, 10, bias=False).double()
    layer.weight = nn.Parameter(distribute_tensor(full, mesh[TENSOR_AXIS], [Shard(0)]))
    fully_shard(layer, mesh=mesh[DATA_AXIS])
    weight, found = layer.weight, {}
    assert isinstance(weight, DTensor)
    for name, expression in EXPRESSIONS.items():
        weight.grad, plain = None, full.clone().requires_grad_()
        wanted = expression(plain)
        wanted.backward()
        with WholeValues():
            value = expression(weight)
            value.backward()
            number = weight.detach().norm().item()
        assert type(value) is Tensor and weight.grad.placements == weight.placements, name
        error = (weight.grad.full_tensor() - plain.grad).abs().max().item()
        found[name] = (value.item() - wanted.item(), error, number - full.norm().item())
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_an_expression_over_shards_has_the_value_and_the_gradient_of_the_whole(on_ranks: Any, world_size: int) -> None:
    for found in on_ranks(compute, world_size):
        assert found.keys() == EXPRESSIONS.keys()
        for name, differences in found.items():
            assert differences == pytest.approx((0, 0, 0), abs=1e-12), name
