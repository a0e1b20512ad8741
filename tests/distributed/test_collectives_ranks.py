"""Every differentiable collective against one process that holds everything, and against finite differences.

Catches: a forgotten, doubled or misplaced all-reduce in a backward (the loss stays right), slices of
the wrong rank, rows that arrive in another order, and a rank that communicates counts its peers do
not expect. float64 throughout: what is left is rounding, far below 1e-12.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lightning_npu_tp.errors import CountMismatch
from lightning_npu_tp.parallel.collectives import (
    all_reduce_sum,
    copy_to_group,
    gather_last_dim,
    group_rank,
    group_size,
    reduce_from_group,
    start_exchange,
)
from lightning_npu_tp.tools.testing.reference import assert_close_relative

TOLERANCE = 1e-13
STEP = 1e-4
# Central differences of a smooth function: the truncation error is about STEP squared.
DIFFERENCE_TOLERANCE = 1e-7


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def slope_along(loss_of, tensor, direction):
    """Central difference of a loss; every rank takes the same step count, so collectives match."""
    with torch.no_grad():
        return (loss_of(tensor + STEP * direction) - loss_of(tensor - STEP * direction)) / (2 * STEP)


def check_region(rank, world_size):
    """Enter with copy, compute a part on each rank, leave with reduce."""
    group = dist.group.WORLD
    weights = [random(5, 7, seed=10 + r) for r in range(world_size)]
    inputs = random(3, 5, seed=1)

    def after(total, x):
        # Used outside the region too, where every rank computes alike: that gradient must not be summed.
        return (total.sin() * random(3, 7, seed=2)).sum() + x.pow(3).sum()

    def loss_of(x):
        partial = (copy_to_group(x, group=group) @ weights[rank]).tanh()
        return after(reduce_from_group(partial, group), x)

    x = inputs.clone().requires_grad_()
    loss = loss_of(x)
    loss.backward()

    whole = inputs.clone().requires_grad_()
    expected = after(sum((whole @ weight).tanh() for weight in weights), whole)
    expected.backward()
    assert_close_relative(loss, expected, TOLERANCE, "loss")
    assert_close_relative(x.grad, whole.grad, TOLERANCE, "gradient")

    direction = random(3, 5, seed=3)
    slope = slope_along(loss_of, inputs, direction)
    return assert_close_relative((x.grad * direction).sum(), slope, DIFFERENCE_TOLERANCE, "finite difference")


def check_several_inputs(rank, world_size):
    """Two tensors enter; one rank uses only the first. Its peers must not wait for the second."""
    group = dist.group.WORLD
    first = random(4, seed=1).requires_grad_()
    second = random(3, seed=2).requires_grad_()
    a, b = copy_to_group(first, second, group=group)
    loss = (rank + 1) * a.pow(2).sum() + (0.0 if rank == 0 else (rank * b.pow(3)).sum())
    loss.backward()
    ranks = range(world_size)
    assert_close_relative(first.grad, 2 * first.detach() * sum(r + 1 for r in ranks), TOLERANCE, "first")
    assert_close_relative(second.grad, 3 * second.detach().pow(2) * sum(ranks), TOLERANCE, "second")


def check_inputs_are_left_alone(rank, world_size):
    group = dist.group.WORLD
    expanded = torch.full((1,), float(rank + 1)).expand(3)
    transposed = torch.arange(6.0).reshape(2, 3).t()
    for tensor in (expanded, transposed, torch.full((2,), float(rank))):
        before = tensor.clone()
        total = all_reduce_sum(tensor, group)
        assert torch.equal(tensor, before)
        reduced = reduce_from_group(tensor, group)
        assert torch.equal(tensor, before) and torch.equal(reduced, total)
    assert torch.equal(all_reduce_sum(expanded, group), torch.full((3,), sum(range(1, world_size + 1)) * 1.0))
    return group_size(group), group_rank(group)


def check_gather(rank, world_size, sizes):
    group = dist.group.WORLD
    locals_ = [random(2, 3, size, seed=20 + r) for r, size in enumerate(sizes)]
    weight = random(2, 3, sum(sizes), seed=4)

    def after(whole):
        return (whole.sin() * weight).sum() + whole.sum(-1).pow(2).sum()

    def loss_of(local):
        return after(gather_last_dim(local, sizes, group))

    local = locals_[rank].clone().requires_grad_()
    gathered = gather_last_dim(local, sizes, group)
    whole = torch.cat(locals_, dim=-1).requires_grad_()
    assert torch.equal(gathered, whole), "pure movement is bitwise"
    after(gathered).backward()
    after(whole).backward()
    start = sum(sizes[:rank])
    assert local.grad.shape == local.shape
    assert_close_relative(local.grad, whole.grad[..., start : start + sizes[rank]], TOLERANCE, "gradient")

    # All ranks step at once, each along its own direction: the slopes of the parts add up.
    direction = random(2, 3, sizes[rank], seed=30 + rank)
    slope = slope_along(loss_of, locals_[rank], direction)
    parts = all_reduce_sum((local.grad * direction).sum(), group)
    return assert_close_relative(parts, slope, DIFFERENCE_TOLERANCE, "finite difference")


def rows_of(counts, rank):
    """Distinct rows: which rank sends them, to whom, and the how-manieth they are."""
    rows = [(rank, to, nth) for to, count in enumerate(counts[rank]) for nth in range(count)]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), 3)


def check_exchange(rank, world_size, counts):
    """counts[source][destination]."""
    group = dist.group.WORLD
    send, recv = counts[rank], [counts[source][rank] for source in range(world_size)]
    labels = rows_of(counts, rank)
    arrived = start_exchange(labels, send, recv, group).wait()
    expected = [(source, rank, nth) for source in range(world_size) for nth in range(counts[source][rank])]
    assert arrived.tolist() == [list(row) for row in expected]

    sixteen_bits = torch.randn(sum(send), 4, generator=generator(rank)).bfloat16()
    there = start_exchange(sixteen_bits, send, recv, group).wait()
    again = start_exchange(there, recv, send, group).wait()
    assert torch.equal(again, sixteen_bits), "there and back is bitwise"

    rows = random(sum(send), 5, seed=40 + rank)
    weight = random(sum(recv), 5, seed=50 + rank)

    def loss_of(local):
        received = start_exchange(local, send, recv, group).wait()
        return all_reduce_sum((received.sin() * weight).sum().detach(), group)

    local = rows.clone().requires_grad_()
    # Not contiguous, as rows picked by a transpose would be.
    received = start_exchange(local.t().contiguous().t(), send, recv, group).wait()
    (received.sin() * weight).sum().backward()

    weights = [torch.empty(sum(counts[s][r] for s in range(world_size)), 5) for r in range(world_size)]
    weights = [random(*w.shape, seed=50 + r) for r, w in enumerate(weights)]
    offsets = [[sum(counts[s][r] for s in range(source)) for r in range(world_size)] for source in range(world_size)]
    mine = [weights[to][offsets[rank][to] : offsets[rank][to] + count] for to, count in enumerate(counts[rank])]
    assert_close_relative(local.grad, rows.cos() * torch.cat(mine), TOLERANCE, "gradient")

    direction = random(sum(send), 5, seed=60 + rank)
    slope = slope_along(loss_of, rows, direction)
    parts = all_reduce_sum((local.grad * direction).sum(), group)
    return assert_close_relative(parts, slope, DIFFERENCE_TOLERANCE, "finite difference")


def check_mismatch(rank, world_size):
    """Wrong counts on one rank only: it must fail alone and leave the group usable."""
    group = dist.group.WORLD
    rows = torch.full((world_size, 2), float(rank))
    refused = 0
    if rank == 0:
        for send, recv in (
            ([1] * (world_size + 1), [1] * world_size),
            ([1] * world_size, [1] * (world_size - 1)),
            ([2] + [1] * (world_size - 1), [1] * world_size),
            ([world_size + 1, -1] + [0] * (world_size - 2), [1] * world_size),
            ([1] * world_size, [-1] + [1] * (world_size - 1)),
        ):
            with pytest.raises(CountMismatch):
                start_exchange(rows, send, recv, group).wait()
            refused += 1
    # Had rank 0 sent anything above, this exchange would meet it.
    received = start_exchange(rows, [1] * world_size, [1] * world_size, group).wait()
    assert received[:, 0].tolist() == [float(r) for r in range(world_size)]
    return refused


def check_part_of_the_world(rank, world_size):
    """Groups of two within four ranks; nothing may leak from one pair to the other."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = pairs[rank // 2]
    x = torch.full((2,), float(rank), dtype=torch.float64, requires_grad=True)
    reduced = reduce_from_group(copy_to_group(x, group=group) * (rank + 1), group)
    reduced.sum().backward()
    first = 2 * (rank // 2)
    assert reduced.tolist() == [first * (first + 1.0) + (first + 1) * (first + 2)] * 2
    assert x.grad.tolist() == [2.0 * first + 3] * 2
    gathered = gather_last_dim(x.detach(), [2, 2], group)
    assert gathered.tolist() == [first, first, first + 1.0, first + 1.0]
    arrived = start_exchange(x.detach()[:, None], [0, 2], [0, 0] if rank % 2 == 0 else [2, 2], group).wait()
    assert arrived.flatten().tolist() == ([] if rank % 2 == 0 else [first, first, first + 1.0, first + 1.0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_region_has_the_loss_and_the_gradient_of_one_process(on_ranks, world_size):
    assert max(on_ranks(check_region, world_size)) <= DIFFERENCE_TOLERANCE


def test_several_tensors_enter_together_even_if_a_rank_uses_only_one(on_ranks):
    assert on_ranks(check_several_inputs, 2) == [None, None]


def test_reductions_leave_their_inputs_alone_whatever_their_strides(on_ranks):
    assert on_ranks(check_inputs_are_left_alone, 2) == [(2, 0), (2, 1)]


@pytest.mark.parametrize("sizes", [[3, 3], [4, 1], [0, 2], [3, 3, 2, 0], [1, 5, 2, 2]], ids=str)
def test_gathered_slices_are_whole_and_each_rank_gets_its_slice_of_the_gradient(on_ranks, sizes):
    assert max(on_ranks(check_gather, len(sizes), sizes)) <= DIFFERENCE_TOLERANCE


@pytest.mark.parametrize(
    "counts",
    [
        [[2, 1], [3, 1]],
        [[0, 0], [2, 3]],
        [[4, 0], [5, 0]],
        [[1, 2, 0, 3], [0, 0, 0, 0], [4, 0, 1, 1], [0, 2, 2, 0]],
        [[0, 0, 3, 0], [0, 0, 2, 0], [0, 0, 4, 0], [0, 0, 1, 0]],
    ],
    ids=["uneven", "a_rank_sends_nothing", "all_to_one", "four_ranks", "four_ranks_all_to_one"],
)
def test_exchanged_rows_arrive_in_the_order_of_their_sources_and_gradients_go_back(on_ranks, counts):
    assert max(on_ranks(check_exchange, len(counts), counts)) <= DIFFERENCE_TOLERANCE


def test_wrong_counts_are_refused_before_anything_is_sent(on_ranks):
    assert on_ranks(check_mismatch, 2) == [5, 0]


def test_a_collective_stays_within_its_group(on_ranks):
    assert on_ranks(check_part_of_the_world, 4) == [None] * 4
