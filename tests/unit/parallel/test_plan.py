"""The sharding plan as data. Catches a parameter that no rule claims, a rule that claims none, wrong chunk bounds."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.parallel.plan import Columns, Experts, Replicated, Rows, chunk_bounds, match_plan


@pytest.mark.parametrize("size", [1, 2, 5, 8, 131, 102400])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_chunk_bounds_are_those_of_torch_chunk(size: int, ranks: int) -> None:
    parts = [part.tolist() for part in torch.arange(size).chunk(ranks)]
    parts += [[]] * (ranks - len(parts))
    ours = [list(range(*chunk_bounds(size, rank, ranks))) for rank in range(ranks)]
    assert ours == parts


def test_placements_follow_the_split_dimension() -> None:
    assert Columns().placement == Shard(0)
    assert Rows().placement == Shard(1)
    assert Replicated(why="test").placement == Replicate()
    assert Experts().axis == "expert"


def test_each_parameter_gets_its_one_rule() -> None:
    plan = {"*.up.weight": Columns(), "*.down.weight": Rows()}
    matched = match_plan(plan, ["a.up.weight", "b.up.weight", "a.down.weight"], family="test")
    assert matched == {
        "a.up.weight": plan["*.up.weight"],
        "b.up.weight": plan["*.up.weight"],
        "a.down.weight": plan["*.down.weight"],
    }


@pytest.mark.parametrize(
    ("plan", "names", "complaint"),
    [
        ({"a": Columns()}, ["a", "b"], "b matches no rule"),
        ({"a": Columns(), "*": Rows()}, ["a"], r"a matches several rules: a, \*"),
        ({"a": Columns(), "z": Rows()}, ["a"], "the rule 'z' matches no parameter"),
    ],
)
def test_a_plan_that_does_not_fit_names_what_is_wrong(plan: dict, names: list[str], complaint: str) -> None:
    with pytest.raises(ConversionError, match=complaint):
        match_plan(plan, names, family="test")
