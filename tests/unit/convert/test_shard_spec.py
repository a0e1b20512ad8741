"""Which part of a parameter a rank holds. Catches a part cut along the wrong dimension, by the ranks of the wrong axis,
and one that data ranks share otherwise than FSDP does."""

from __future__ import annotations

import pytest
import torch

from lightning_npu_tp.convert.shard_spec import ShardSpec, size_of
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.parallel.plan import Columns, Experts, Replicated, Rows, Rule

TENSOR = Layout(1, 4, 4)


def test_a_part_follows_the_split_dimension() -> None:
    def shape(rule: Rule, whole: tuple[int, ...], rank: int) -> tuple[int, ...]:
        return size_of(ShardSpec.of(rule, whole, TENSOR, rank).bounds)

    assert shape(Columns(), (10, 3), rank=3) == (1, 3)
    assert shape(Rows(), (3, 10), rank=0) == (3, 3)
    assert shape(Replicated(why="test"), (7,), rank=1) == (7,)
    assert shape(Experts(), (8, 2, 2), rank=3) == (2, 2, 2)


@pytest.mark.parametrize("rule", [Columns(), Rows(), Experts(), Replicated(why="test")], ids=["c", "r", "e", "all"])
@pytest.mark.parametrize("sizes", [(1, 4, 4), (4, 1, 2), (4, 1, 1), (2, 2, 4), (4, 1, 4)])
def test_all_ranks_together_hold_the_whole_as_often_as_it_is_copied(rule: Rule, sizes: tuple[int, int, int]) -> None:
    layout, whole = Layout(*sizes), torch.arange(6 * 9 * 5).reshape(6, 9, 5)
    specs = [ShardSpec.of(rule, (6, 9, 5), layout, rank) for rank in range(layout.world)]
    replicas = layout.expert_replicas if rule.axis == "expert" else layout.data
    copies = layout.tensor if rule.dim is None else 1
    counted = torch.zeros_like(whole)
    for rank, spec in enumerate(specs):
        assert torch.equal(spec.cut(whole), whole[tuple(slice(*pair) for pair in spec.bounds)])
        assert spec.is_shared == (replicas > 1)
        counted[tuple(slice(*pair) for pair in spec.held)] += 1
        unshared = ShardSpec.of(rule, (6, 9, 5), layout, rank, "replicate")
        assert not unshared.is_shared and unshared.held == unshared.bounds == spec.bounds
    assert counted.eq(copies).all()


def test_fewer_experts_than_replicas_are_shared_by_their_width() -> None:
    spec = ShardSpec.of(Experts(), (2, 8, 3), Layout(4, 1, 1), rank=3)
    assert spec.bounds == ((0, 2), (0, 8), (0, 3)) and spec.held == ((0, 2), (6, 8), (0, 3))


def test_a_part_does_not_keep_the_whole_alive() -> None:
    whole = torch.zeros(8, 3)
    part = ShardSpec.of(Rows(), (8, 3), Layout(1, 3, 3), rank=1).cut(whole)
    assert part.is_contiguous() and part.untyped_storage().nbytes() == 8 * 4
