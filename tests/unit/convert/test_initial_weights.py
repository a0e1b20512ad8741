"""Initial weights depend on seed and name alone. Catches a stream that depends on the layout, on the order of
parameters or on Python's hash seed, and experts that are copies of each other."""

from __future__ import annotations

import pytest
import torch

from lightning_npu_tp.convert.initial_weights import initial_shard, stream_seed
from lightning_npu_tp.convert.shard_spec import ShardSpec
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.parallel.plan import Columns, Experts, Replicated, Rows, Rule, Vocab


def drawn(name: str, shape: tuple[int, ...], rule: Rule, rank: int, ranks: int, **settings: float) -> torch.Tensor:
    return initial_shard(name, ShardSpec.of(rule, shape, Layout(1, ranks, ranks), rank), **settings)


@pytest.mark.parametrize("rule", [Columns(), Rows(), Vocab(), Experts(), Replicated(why="test")])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_shards_of_any_layout_are_slices_of_one_tensor(rule, ranks: int) -> None:
    shape = (9, 7, 5) if rule.axis == "expert" else (9, 7)
    whole = drawn("layer.weight", shape, rule, 0, 1, seed=3, std=0.02)
    parts = [drawn("layer.weight", shape, rule, rank, ranks, seed=3, std=0.02) for rank in range(ranks)]
    if rule.dim is None:
        assert all(torch.equal(part, whole) for part in parts)
    else:
        assert torch.equal(torch.cat(parts, dim=rule.dim), whole)
    assert all(part.is_contiguous() for part in parts)


def test_seed_name_and_expert_each_change_the_numbers() -> None:
    draw = lambda name, seed: drawn(name, (4, 8, 8), Experts(), 0, 1, seed=seed, std=1.0)  # noqa: E731
    first = draw("a", 0)
    assert not torch.equal(first, draw("b", 0))
    assert not torch.equal(first, draw("a", 1))
    assert not torch.equal(first[0], first[1])


def test_the_numbers_are_the_same_on_every_machine() -> None:
    assert stream_seed(42, "model.norm.weight") == 8410709811135521552
    assert stream_seed(42, "model.norm.weight", 1) != stream_seed(42, "model.norm.weight")


def test_standard_deviation_ones_and_zeros_are_as_the_rule_says() -> None:
    normal = drawn("w", (300, 300), Columns(), 0, 1, seed=0, std=0.5)
    assert abs(normal.std().item() - 0.5) < 0.01
    assert abs(normal.mean().item()) < 0.01
    assert torch.equal(drawn("w", (4,), Replicated(why="t", init="ones"), 1, 2, seed=0, std=0.5), torch.ones(4))
    assert torch.equal(drawn("w", (4,), Columns(init="zeros"), 1, 2, seed=0, std=0.5), torch.zeros(2))
