"""Parallel modules of PyTorch over the simulated HCCL against the same over gloo: DTensor, FSDP2, saved checkpoints.

Catches a collective that is right by itself and wrong in the order, the views or the streams that these use. The ranks
hold both backends and train the same model on a mesh of the CPU and on one of cards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ascend_sim

ascend_sim.install()

BACKEND = "cpu:gloo,npu:hccl"
# Sums of a few dozen float32 products, added in another order by another backend, over two steps.
FLOAT32 = 2e-6
# The same with gradients that travel as bfloat16, whose sums gloo rounds at every rank and HCCL once.
BFLOAT16 = 2e-2

pytestmark = pytest.mark.filterwarnings("ignore")


class Block(nn.Module):
    """Two matrices as a transformer has them, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 48)
        self.down = nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def model_on(place: str) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(Block(), Block(), nn.Linear(16, 7)).to(place)


def places(rank: int) -> list[str]:
    import torch_npu  # noqa: F401

    torch.npu.set_device(rank)
    return ["cpu", "npu"]


def batch(rank: int, place: str) -> Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(rank)).to(place)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().float()


def train(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Losses, gradients after the last backward pass and parameters after two steps, whole and on the CPU."""
    # Not foreach: parameters outside the parallel blocks are plain tensors.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(x).float().square().mean()
        loss.backward()
        found.append(loss.detach().cpu())
        optimizer.step()
    found += [whole(parameter.grad) for parameter in model.parameters()]
    return found + [whole(parameter) for parameter in model.parameters()]


def assert_close(there: list[Tensor], here: list[Tensor], tolerance: float) -> None:
    for actual, wanted in zip(there, here, strict=True):
        assert (actual - wanted).norm() <= tolerance * wanted.norm().clamp(min=1e-3)


def tensor_parallel(rank: int, world: int) -> None:
    runs = []
    for place in places(rank):
        mesh = init_device_mesh(place, (world,))
        model = model_on(place)
        for block in list(model)[:2]:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        runs.append(train(model, batch(0, place)))
        # Uneven shards to whole, to another axis, and back.
        table = torch.arange(15.0 * world).view(5, -1)
        moved = distribute_tensor(table.to(place), mesh, [Shard(0)]).redistribute(mesh, [Shard(1)])
        runs[-1] += [whole(moved), whole(moved.redistribute(mesh, [Replicate()]))]
        assert torch.equal(runs[-1][-1], table)
    assert_close(runs[1], runs[0], FLOAT32)


def sharded(place: str, world: int, reduce_dtype: torch.dtype | None = None) -> nn.Module:
    mesh = init_device_mesh(place, (world,))
    model = model_on(place)
    for part in (*model, model):
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=reduce_dtype))
    return model


def sharded_data(rank: int, world: int) -> None:
    for reduce_dtype, tolerance in ((None, FLOAT32), (torch.bfloat16, BFLOAT16)):
        runs = [train(sharded(place, world, reduce_dtype), batch(rank, place)) for place in places(rank)]
        assert_close(runs[1], runs[0], tolerance)


def checkpoint(rank: int, world: int, folder: str) -> None:
    """Saved from cards and loaded on the CPU, and the other way round: both backends plan and read the same."""
    states: dict[str, dict[str, Any]] = {place: {} for place in places(rank)}
    for place in states:
        model = sharded(place, world)
        train(model, batch(rank, place))
        states[place] = {name: value for name, value in model.state_dict().items()}
        dcp.save(states[place], checkpoint_id=Path(folder) / place)
    for source, target in (("npu", "cpu"), ("cpu", "npu")):
        loaded = sharded(target, world).state_dict()
        dcp.load(loaded, checkpoint_id=Path(folder) / source)
        for name, value in states[source].items():
            assert torch.equal(whole(loaded[name]), whole(value)), name
    dist.barrier()


@pytest.mark.parametrize("world", [2, 4])
def test_tensor_parallel_modules_learn_as_over_gloo(on_ranks, world):
    on_ranks(tensor_parallel, world, backend=BACKEND, timeout=120)


@pytest.mark.parametrize("world", [2, 4])
def test_fully_sharded_modules_learn_as_over_gloo(on_ranks, world):
    on_ranks(sharded_data, world, backend=BACKEND, timeout=120)


def test_checkpoints_pass_between_cards_and_the_cpu(on_ranks, tmp_path):
    on_ranks(checkpoint, 2, str(tmp_path), backend=BACKEND, timeout=120)
