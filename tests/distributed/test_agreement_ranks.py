"""Catches: a rank that starts with other settings or another number of batches than its peers, and a NaN that lies on
one rank's shard only and stops that rank alone.
"""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_npu_tp.callbacks.nonfinite import NonFiniteError, NonFiniteGuard
from lightning_npu_tp.errors import ConfigError, DataError
from lightning_npu_tp.launch.same_settings import require_agreement, require_equal_batches
from lightning_npu_tp.parallel.layout import Layout

WORLD = 4


def message(call, error) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def gathers_of(call) -> int:
    """How many object gathers a call makes."""
    original, calls = dist.all_gather_object, []
    dist.all_gather_object = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    try:
        call()
    finally:
        dist.all_gather_object = original
    return len(calls)


def agreement_on(rank, world):
    same = {"trainer": {"max_steps": 20}, "seed": "1"}
    agreed = gathers_of(lambda: require_agreement(same))
    different = {"trainer": {"max_steps": 10 if rank == 2 else 20}, **({"extra": [1]} if rank == 3 else {})}
    many = {f"key{index}": rank if rank == 1 else 0 for index in range(7)}
    texts = [message(lambda: require_agreement(settings), ConfigError) for settings in (different, many)]
    return agreed, texts


def test_a_rank_with_another_setting_ends_every_rank_with_both_values(on_ranks):
    results = on_ranks(agreement_on, WORLD)
    # Settings that agree cost one gather of hashes.
    assert [agreed for agreed, _ in results] == [1] * WORLD
    assert len({tuple(texts) for _, texts in results}) == 1
    different, many = results[0][1]
    assert "trainer.max_steps is 10 on rank 2 (host " in different and "but 20 on rank 0" in different
    assert "extra is [1] on rank 3" in different and "but not set on rank 0" in different
    assert "Give every rank the same command line" in different
    assert many.count(" on rank 1 ") == 5 and "; and 2 more." in many


def batches_on(rank, world):
    layout = Layout(data=2, tensor=2, expert=2)
    mine = 7 if rank < 2 else 9
    require_equal_batches(float("inf"), layout=layout)
    require_equal_batches(mine, layout=layout, batches_needed=7)
    unknown = float("inf") if rank == 3 else 9
    return [
        message(lambda: require_equal_batches(mine, layout=layout, batches_needed=8), DataError),
        message(lambda: require_equal_batches(unknown, layout=layout), DataError),
    ]


def test_data_ranks_with_different_numbers_of_batches_are_refused_unless_the_run_ends_before(on_ranks):
    results = on_ranks(batches_on, WORLD)
    assert results == [results[0]] * WORLD
    uneven, unknown = results[0]
    assert "7 on ranks 0 and 1 (data rank 0); 9 on ranks 2 and 3 (data rank 1)" in uneven
    assert "trainer.limit_train_batches=7" in uneven
    assert "9 on ranks 0 to 2 (data ranks 0 and 1); no known number on rank 3 (data rank 1)" in unknown


class Sharded(L.LightningModule):
    """A replicated, a tensor-sharded, an expert-sharded and a plain parameter."""

    def __init__(self) -> None:
        super().__init__()
        dense = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        experts = init_device_mesh("cpu", (1, 4), mesh_dim_names=("replica", "expert"))
        ones = torch.ones(4, 2)
        self.norm = torch.nn.Parameter(distribute_tensor(ones, dense, [Replicate(), Replicate()]))
        self.rows = torch.nn.Parameter(distribute_tensor(ones, dense, [Shard(0), Shard(0)]))
        # Two experts for four ranks: two of them hold nothing.
        self.experts = torch.nn.Parameter(distribute_tensor(torch.ones(2, 3), experts, [Replicate(), Shard(0)]))
        self.plain = torch.nn.Parameter(ones.clone())

    def log(self, *_, **__) -> None: ...


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def guarded_step_on(rank, world, action, bad_rank, name):
    """One good AdamW step, then one whose gradient of `name` is NaN on `bad_rank`; (error, whether nothing moved)."""
    module = Sharded()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, foreach=False)
    trainer = SimpleNamespace(precision_plugin=None, global_step=4, is_global_zero=rank == 0)
    guard = NonFiniteGuard(action=action)

    def step(poison: bool) -> None:
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        if poison:
            local(getattr(module, name).grad)[0, 0] = float("nan")
        guard.on_before_optimizer_step(trainer, module, optimizer)
        optimizer.step()

    def state():
        tensors = [*module.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
        return [local(tensor.detach()).clone() for tensor in tensors]

    start = state()
    step(poison=False)
    before = state()
    assert len(before) > len(start) and not torch.equal(before[0], start[0])
    error = None
    try:
        step(poison=rank == bad_rank)
    except NonFiniteError as caught:
        error = str(caught)
    return error, all(map(torch.equal, state(), before)), guard.skipped


@pytest.mark.parametrize("name", ["rows", "experts"])
def test_a_nan_in_one_ranks_shard_stops_all_ranks_and_names_it(on_ranks, name):
    results = on_ranks(guarded_step_on, WORLD, "stop", 1, name)
    assert len({error for error, _, _ in results}) == 1 and all(untouched for _, untouched, _ in results)
    assert f"The gradient of {name} is not finite in optimizer step 5, on rank 1." in results[0][0]


def test_a_nan_in_one_ranks_shard_is_skipped_by_all_ranks(on_ranks):
    assert on_ranks(guarded_step_on, WORLD, "skip", 2, "rows") == [(None, True, 1)] * WORLD
