"""Every collective that the package uses, on cards. Catches a link, a group or a split that delivers something else."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lightning_npu_tp.devices.device import backend_for, torch_module
from lightning_npu_tp.parallel.collectives import all_reduce_sum, gather_last_dim, start_exchange
from lightning_npu_tp.parallel.layout import Layout, Meshes
from lightning_npu_tp.parallel.sequence import join_slices, sum_to_slice


def open_group(rank: int, world_size: int, device_type: str) -> torch.device:
    torch_module(device_type).set_device(rank)
    device = torch.device(device_type, rank)
    dist.init_process_group(backend_for(device_type), rank=rank, world_size=world_size, device_id=device)
    return device


def collectives(rank: int, world_size: int, device_type: str) -> list[str]:
    """Names of those that gave something else than they should."""
    device, group = open_group(rank, world_size, device_type), dist.group.WORLD
    assert group is not None
    mine = torch.arange(6.0, device=device).view(2, 3) + 100 * rank
    everyones = [torch.arange(6.0).view(2, 3) + 100 * other for other in range(world_size)]
    total = sum(everyones[1:], everyones[0])
    results: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        # Small whole numbers are exact in bfloat16.
        results[f"all-reduce {dtype}"] = (
            all_reduce_sum(torch.full((5,), rank + 1, dtype=dtype, device=device), group),
            torch.full((5,), world_size * (world_size + 1) // 2, dtype=dtype),
        )
    results["all-reduce"] = all_reduce_sum(mine, group), total
    results["gather of the last dimension"] = (
        gather_last_dim(mine, [3] * world_size, group),
        torch.cat(everyones, dim=1),
    )
    results["gather of slices"] = join_slices(mine, 3 * world_size, group), torch.cat(everyones, 1)
    whole = torch.arange(2.0 * world_size, device=device)[None]
    results["reduce-scatter"] = (
        sum_to_slice(whole, group),
        world_size * torch.arange(2.0 * rank, 2 * rank + 2)[None],
    )
    # Rank r sends r + d rows to rank d, and with that none to rank 0 from rank 0.
    send, receive = ([rank + other for other in range(world_size)] for _ in range(2))
    rows = torch.cat([torch.full((rank + other, 2), 10.0 * rank + other, device=device) for other in range(world_size)])
    results["uneven all-to-all"] = (
        start_exchange(rows, send, receive, group).wait(),
        torch.cat([torch.full((rank + other, 2), 10.0 * other + rank) for other in range(world_size)]),
    )
    largest = torch.full((), float(rank), device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    results["maximum"] = largest, torch.tensor(float(world_size - 1))
    given = torch.full((3,), float(rank), device=device)
    dist.broadcast(given, 1)
    results["broadcast"] = given, torch.ones(3)
    names: list[Any] = [None] * world_size
    dist.all_gather_object(names, rank)
    results["objects"] = torch.tensor(names), torch.arange(world_size)
    return [name for name, (got, wanted) in results.items() if not torch.equal(got.cpu(), wanted)]


def test_collectives_deliver_what_they_should(card, several, on_ranks):
    for rank, wrong in enumerate(on_ranks(collectives, several, card, backend=None)):
        assert not wrong, f"rank {rank}"


def groups_of_meshes(rank: int, world_size: int, device_type: str) -> dict[str, tuple[list[int], float]]:
    """Ranks of this rank's groups, and the sum of the ranks over each."""
    device = open_group(rank, world_size, device_type)
    found = {}
    for layout in (Layout(world_size // 2, 2, 2), Layout(world_size, 1, 2)):
        meshes = Meshes.build(layout, device_type)
        for name in ("tensor_group", "data_group", "expert_group"):
            group = getattr(meshes, name)
            total = all_reduce_sum(torch.full((), float(rank), device=device), group)
            found[f"{layout.data} {layout.tensor} {name}"] = (dist.get_process_group_ranks(group), total.item())
    return found


def test_every_group_of_a_mesh_reaches_its_ranks(card, several, on_ranks):
    for rank, found in enumerate(on_ranks(groups_of_meshes, several, card, backend=None)):
        assert len(found) == 6
        for name, (ranks, total) in found.items():
            assert rank in ranks and total == sum(ranks), f"rank {rank}: {name}"
