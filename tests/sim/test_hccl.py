"""Every collective of torch.distributed on the real ProcessGroupHCCL over the simulated HCCL, against gloo.

Catches data that reaches the wrong rank or place, a slice lost at a buffer's end, a sum of another order on another
rank, a collective that overtakes another, and one that seems done when it is not. Each rank holds both backends
("cpu:gloo,npu:hccl", as the strategy does), so that one process makes the collective and its reference.
"""

from __future__ import annotations

import time
from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ascend_sim

ascend_sim.install()

BACKEND = "cpu:gloo,npu:hccl"
# The halves of a rank in shared memory hold 1 MiB: beyond it data travels in slices, of which the last is short.
SLICE = 2**18
LARGE = 3 * SLICE + 5

pytestmark = pytest.mark.filterwarnings("ignore")


def draw(rank: int, size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """What a rank puts in; every rank can draw every other's."""
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(1000 * seed + 7 * rank + size)) * 20
    return numbers > 0 if dtype == torch.bool else numbers.to(dtype)


def device_of(rank: int) -> torch.device:
    import torch_npu  # noqa: F401

    torch.npu.set_device(rank % torch.npu.device_count())
    return torch.device("npu", rank % torch.npu.device_count())


def assert_same(actual: Tensor, wanted: Tensor, what: object = "") -> None:
    """Bit by bit."""
    actual = actual.cpu()
    assert actual.dtype == wanted.dtype and actual.shape == wanted.shape, what
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    assert torch.equal(actual.contiguous().view(bits), wanted.contiguous().view(bits)), what


# Movement of data

MOVED = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def splits(world: int) -> list[list[int]]:
    """Rows from each rank to each: uneven, with zeros, rank 1 sends nothing and the last receives nothing."""
    rows = [[(3 * source + 5 * target) % 4 for target in range(world)] for source in range(world)]
    rows[1] = [0] * world
    for row in rows:
        row[-1] = 0
    return rows


def move(rank: int, world: int) -> None:
    device = device_of(rank)
    # Eight ranks are for the places that data goes to, not for its types.
    for dtype in MOVED if world < 8 else MOVED[:1]:
        for size in (0, 1001) + ((LARGE,) if dtype == torch.float32 else ()):
            what = (dtype, size)
            inputs = [draw(source, size, dtype) for source in range(world)]
            mine = inputs[rank].to(device)

            buffer = mine.clone()
            dist.broadcast(buffer, src=world - 1)
            assert_same(buffer, inputs[-1], ("broadcast", *what))

            gathered = torch.empty(world * size, dtype=dtype, device=device)
            dist.all_gather_into_tensor(gathered, mine)
            assert_same(gathered, torch.cat(inputs), ("all_gather_into_tensor", *what))

            parts = [torch.empty_like(mine) for _ in range(world)]
            dist.all_gather(parts, mine)
            assert_same(torch.cat(parts), torch.cat(inputs), ("all_gather", *what))

            part = torch.empty_like(mine)
            dist.scatter(part, [tensor.to(device) for tensor in inputs] if rank == 0 else None, src=0)
            assert_same(part, inputs[rank], ("scatter", *what))

            rows = [draw(source, world * size, dtype, seed=1) for source in range(world)]
            exchanged = torch.empty(world * size, dtype=dtype, device=device)
            dist.all_to_all_single(exchanged, rows[rank].to(device))
            wanted = torch.cat([row[rank * size : (rank + 1) * size] for row in rows])
            assert_same(exchanged, wanted, ("all_to_all_single", *what))
    move_beside_gloo(rank, world, device)


def move_beside_gloo(rank: int, world: int, device: torch.device) -> None:
    """The same calls on the CPU's tensors and the card's."""
    rows = splits(world)
    sent, received = rows[rank], [row[rank] for row in rows]
    for width in (3, 70_001):
        outputs = []
        for place in ("cpu", device):
            data = draw(rank, sum(sent) * width).view(-1, width).to(place)
            output = torch.full((sum(received), width), -1.0, device=place)
            dist.all_to_all_single(output, data, received, sent)
            given = list(data.split(sent))
            taken = [torch.empty(count, width, device=place) for count in received]
            if place != "cpu":
                # gloo has no all_to_all of lists.
                dist.all_to_all(taken, given)
                assert_same(torch.cat(taken), output.cpu())
            outputs.append(output.cpu())
        assert_same(outputs[1], outputs[0], ("uneven all_to_all_single", width))
    outputs = []
    for place in ("cpu", device):
        outputs.append([])
        for peer in (1, world - 1):
            tensor = draw(rank, 100_003).to(place)
            if rank == 0:
                dist.send(tensor, peer)
                dist.recv(tensor, peer)
            elif rank == peer:
                buffer = torch.empty_like(tensor)
                dist.recv(buffer, 0)
                dist.send(tensor + buffer, 0)
            outputs[-1].append(tensor.cpu())
        ring = ring_of(rank, world, place)
        for work in dist.batch_isend_irecv([operation for operation, _ in ring]):
            work.wait()
        outputs[-1] += [buffer.cpu() for _, buffer in ring]
    for here, there in zip(*outputs, strict=True):
        assert_same(there, here, "send, recv, batch_isend_irecv")


def ring_of(rank: int, world: int, place: torch.device | str) -> list[tuple[dist.P2POp, Tensor]]:
    """Sends to the next rank and receives from the last, of several sizes in one batch."""
    operations = []
    for size in (1, 50_000, 300_000):
        out, into = draw(rank, size).to(place), torch.empty(size, device=place)
        operations.append((dist.P2POp(dist.isend, out, (rank + 1) % world), out))
        operations.append((dist.P2POp(dist.irecv, into, (rank - 1) % world), into))
    return operations


@pytest.mark.parametrize("world", [2, 4, pytest.param(8, marks=pytest.mark.world8)])
def test_data_arrives_bit_by_bit(on_ranks, world):
    on_ranks(move, world, backend=BACKEND, timeout=200)


# Reductions

EPSILON = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
REDUCED = (*EPSILON, torch.int64, torch.int32, torch.int16, torch.int8)
OPERATIONS = {"SUM": torch.add, "PRODUCT": torch.mul, "MAX": torch.maximum, "MIN": torch.minimum}
# The card's HCCL has no product of these.
NO_PRODUCT = (torch.bfloat16, torch.int16)


def wanted_and_bound(inputs: list[Tensor], operation: str) -> tuple[Tensor, Tensor]:
    """In float64 (or wrapping integers), and how far a sum or product in float32, rounded once, may be."""
    if not inputs[0].is_floating_point():
        return list(accumulate(inputs, OPERATIONS[operation]))[-1], torch.zeros(())
    exact = [tensor.double() for tensor in inputs]
    wanted = list(accumulate(exact, OPERATIONS[operation]))[-1]
    if operation in ("MAX", "MIN"):
        return wanted, torch.zeros(())
    magnitude = sum(tensor.abs() for tensor in exact) if operation == "SUM" else wanted.abs()
    rounding = EPSILON[inputs[0].dtype] * wanted.abs() if inputs[0].element_size() == 2 else 0
    # The last term is half of float16's smallest step.
    return wanted, len(inputs) * EPSILON[torch.float32] * magnitude + rounding + 2.0**-25


def assert_reduced(actual: Tensor, inputs: list[Tensor], operation: str, what: object) -> None:
    wanted, bound = wanted_and_bound(inputs, operation)
    actual = actual.cpu()
    assert actual.dtype == inputs[0].dtype, what
    if not actual.is_floating_point():
        assert torch.equal(actual, wanted), what
        return
    infinite = wanted.abs() > torch.finfo(actual.dtype).max
    assert (actual.double() - wanted)[~infinite].abs().le(bound.expand_as(wanted)[~infinite]).all(), what


def reduce(rank: int, world: int) -> None:
    device = device_of(rank)
    for dtype in REDUCED:
        for operation in OPERATIONS:
            if operation == "PRODUCT" and dtype in NO_PRODUCT:
                continue
            op = getattr(dist.ReduceOp, operation)
            for size in (0, 1001) + ((LARGE,) if (dtype, operation) == (torch.bfloat16, "SUM") else ()):
                what = (dtype, operation, size)
                inputs = [draw(source, size, dtype) for source in range(world)]
                every = inputs[rank].to(device)
                dist.all_reduce(every, op)
                assert_reduced(every, inputs, operation, ("all_reduce", *what))
                # The same bits on all ranks, told by the other backend.
                copies = [torch.empty(size * dtype.itemsize, dtype=torch.uint8) for _ in range(world)]
                dist.all_gather(copies, every.cpu().view(torch.uint8))
                assert all(torch.equal(copy, copies[0]) for copy in copies), what

                single = inputs[rank].to(device)
                dist.reduce(single, dst=1, op=op)
                if rank == 1:
                    assert_same(single, every.cpu(), ("reduce", *what))

                rows = [draw(source, world * size, dtype, seed=2) for source in range(world)]
                share = torch.empty(size, dtype=dtype, device=device)
                dist.reduce_scatter_tensor(share, rows[rank].to(device), op)
                assert_reduced(
                    share, [row[rank * size : (rank + 1) * size] for row in rows], operation, ("reduce_scatter", *what)
                )
    reduce_beside_gloo(rank, world, device)


def reduce_beside_gloo(rank: int, world: int, device: torch.device) -> None:
    inputs = [draw(source, 5000) for source in range(world)]
    here, there = inputs[rank].clone(), inputs[rank].to(device)
    dist.all_reduce(here)
    dist.all_reduce(there)
    # Both are within the bound of the exact sum.
    _, bound = wanted_and_bound(inputs, "SUM")
    assert (there.cpu().double() - here.double()).abs().le(2 * bound).all()
    mean = inputs[rank].to(device)
    dist.all_reduce(mean, dist.ReduceOp.AVG)
    assert torch.equal(mean.cpu(), there.cpu() / world)
    share = torch.empty(10, device=device)
    dist.reduce_scatter(share, [tensor.to(device) for tensor in inputs[rank][: 10 * world].split(10)])
    assert_reduced(share, [tensor[10 * rank : 10 * rank + 10] for tensor in inputs], "SUM", "reduce_scatter of a list")
    # torch_npu sends bool and uint8 as int32.
    flags = torch.tensor([rank == 0, False, True], device=device)
    dist.all_reduce(flags)
    assert flags.tolist() == [True, False, True]
    small = torch.tensor([rank, 1], dtype=torch.uint8, device=device)
    dist.all_reduce(small)
    assert small.tolist() == [world * (world - 1) // 2, world]
    for refused, op in ((torch.float64, dist.ReduceOp.SUM), (torch.int32, dist.ReduceOp.BXOR)):
        with pytest.raises(RuntimeError, match="Unsupported data type|Cannot use ReduceOp.BXOR"):
            dist.all_reduce(torch.ones(2, dtype=refused, device=device), op)


@pytest.mark.parametrize("world", [2, 4])
def test_reductions_are_exact_to_rounding_and_alike_on_all_ranks(on_ranks, world):
    on_ranks(reduce, world, backend=BACKEND, timeout=200)


def round_halves(rank: int, world: int) -> None:
    """Every float16 there is, and sums of pairs around its limits, as PyTorch rounds them."""
    device = device_of(rank)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    for other in (0.0, 1.0, 2.0**-24, -65504.0, 2.0**-14):
        inputs = [halves, torch.full_like(halves, other)]
        total = inputs[rank].to(device)
        dist.all_reduce(total)
        wanted = (inputs[0].float() + inputs[1].float()).half()
        both = total.cpu()
        assert torch.equal(both.isnan(), wanted.isnan())
        assert_same(both[~wanted.isnan()], wanted[~wanted.isnan()], other)
    numbers = torch.randn(4096) * 10.0 ** torch.randint(-38, 38, (4096,))
    inputs = [numbers.bfloat16(), (numbers * 1.003).bfloat16()]
    total = inputs[rank].to(device)
    dist.all_reduce(total)
    assert_same(total, (inputs[0].float() + inputs[1].float()).bfloat16())


def test_sixteen_bit_sums_round_as_pytorch_does(on_ranks):
    on_ranks(round_halves, 2, backend=BACKEND)


# Order and time


def queue(rank: int, world: int) -> None:
    device = device_of(rank)
    # new_group is a call of all ranks, members or not.
    halves = [dist.new_group(list(range(start, world, 2)), backend=BACKEND) for start in range(2)]
    mine, last = halves[rank % 2], dist.new_group(list(range(world)), backend=BACKEND)
    members = range(rank % 2, world, 2)
    tensors, works, wanted = [], [], []
    for turn in range(12):
        tensor = torch.full((turn * 3000 + 1,), float(rank + turn), device=device)
        group, ranks = [(None, range(world)), (mine, members), (last, range(world))][turn % 3]
        works.append(dist.all_reduce(tensor, group=group, async_op=True))
        tensors.append(tensor)
        wanted.append(float(sum(member + turn for member in ranks)))
    gathered = torch.empty(len(members) * 5, device=device)
    works.append(
        dist.all_gather_into_tensor(gathered, torch.full((5,), float(rank), device=device), mine, async_op=True)
    )
    for work in reversed(works):
        work.wait()
    for tensor, value in zip(tensors, wanted, strict=True):
        assert set(tensor.tolist()) == {value}
    assert gathered.tolist() == [float(member) for member in members for _ in range(5)]
    with dist._coalescing_manager(device=device, async_ops=True) as together:
        for tensor in tensors[:4]:
            tensor.fill_(rank)
            dist.all_reduce(tensor)
    together.wait()
    assert all(set(tensor.tolist()) == {world * (world - 1) / 2} for tensor in tensors[:4])
    parts = torch.ops._c10d_functional.all_gather_into_tensor_coalesced(tensors[:2], world, dist.group.WORLD.group_name)
    for part, tensor in zip(parts, tensors, strict=False):
        part = torch.ops._c10d_functional.wait_tensor(part)
        assert_same(part, tensor.cpu().repeat(world))
    for group in (*halves, last):
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


@pytest.mark.parametrize("world", [2, 4])
def test_collectives_of_several_groups_run_side_by_side(on_ranks, world):
    on_ranks(queue, world, backend=BACKEND, timeout=120)


def carry_objects(rank: int, world: int) -> None:
    device = device_of(rank)
    card_only = dist.new_group(list(range(world)), backend="hccl")
    for group in (None, card_only):
        found = [None] * world
        dist.all_gather_object(found, {"rank": rank, "text": "x" * rank * 1000}, group=group)
        assert found == [{"rank": source, "text": "x" * source * 1000} for source in range(world)]
        values = [("of rank", 1)] if rank == 1 else [None]
        dist.broadcast_object_list(values, src=1, group=group, device=device if group else None)
        assert values == [("of rank", 1)]
    # A barrier holds everybody until the last has come.
    begin = time.monotonic()
    if rank == 0:
        time.sleep(0.5)
    dist.barrier(group=card_only)
    assert time.monotonic() - begin > 0.45
    dist.destroy_process_group(card_only)


@pytest.mark.parametrize("world", [2, 4])
def test_objects_and_barriers(on_ranks, world):
    on_ranks(carry_objects, world, backend=BACKEND)


def read_too_early(rank: int, world: int) -> tuple[str, float, float]:
    """The text that a read without a wait raises, and what it then sees, before and after the wait."""
    device = device_of(rank)
    tensor = torch.ones(8, device=device)
    dist.all_reduce(tensor)
    dist.barrier()
    torch.npu.synchronize()
    if rank == 0:
        time.sleep(0.5)
    work = dist.all_reduce(tensor, async_op=True)
    # As the card's memory is, whoever looks: the host's view of it, past all checks.
    import ctypes

    early = ctypes.c_float.from_address(tensor.data_ptr()).value
    text = ""
    try:
        tensor.add(0)
    except RuntimeError as error:
        text = str(error)
    work.wait()
    return text, early, float(tensor[0])


def test_a_missing_wait_reads_stale_data_and_is_told(on_ranks):
    (first, _, done), (second, early, late) = on_ranks(read_too_early, 2, backend=BACKEND)
    assert (early, late, done) == (2.0, 4.0, 4.0)
    for text in (first, second):
        assert "HcclAllReduce" in text


def count(rank: int, world: int) -> dict[str, int]:
    device = device_of(rank)
    with ascend_sim.report.between() as grown:
        for _ in range(3):
            dist.all_reduce(torch.ones(10, device=device))
        dist.all_gather_into_tensor(torch.empty(4 * world, device=device), torch.ones(4, device=device))
        torch.npu.synchronize()
    return {name: value for name, value in grown.items() if name.startswith("hccl.")}


def test_calls_and_bytes_are_counted_by_operation_and_group(on_ranks):
    for grown in on_ranks(count, 2, backend=BACKEND):
        assert grown["hccl.HcclAllReduce.calls"] == 3 and grown["hccl.HcclAllReduce.bytes"] == 120
        assert grown["hccl.HcclAllGather.calls"] == 1 and grown["hccl.HcclAllGather.bytes"] == 16
        (name,) = (name for name in grown if name.startswith("hccl.HcclAllReduce[") and name.endswith(".bytes"))
        assert grown[name] == 120
