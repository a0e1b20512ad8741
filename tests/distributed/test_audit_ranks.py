"""Catches a layout that stalls an Ascend card where one process does not: in a collective, a gradient's reduction, an
exchange or a recomputed layer; and an audit that does not bring home what a rank has seen.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.models.moe import block
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.tools import audit_run
from lightning_npu_tp.tools.audit import merge
from lightning_npu_tp.tools.testing.models import tiny_config

# family, layout, options, reads that are by design: one per mixture layer and micro-batch
CASES: list[tuple[str, Layout, Options, int]] = [
    ("deepseek_v2", Layout(1, 2, 2), Options(sequence_parallel=True, recompute="moe"), 0),
    ("deepseek_v2", Layout(2, 1, 2), Options(recompute="block"), 6),
    ("qwen3_moe", Layout(1, 2, 2), Options(dispatch="all_to_all", sequence_parallel=True), 3),
    ("mixtral", Layout(2, 1, 1), Options(data_parallel="replicate"), 0),
    ("llama", Layout(2, 1, 1), Options(), 0),
]


def request(family: str, layout: Layout, options: Options) -> audit_run.Request:
    return audit_run.Request(config=tiny_config(family), layout=layout, options=options)


def all_cases(rank: int, world_size: int) -> list[list[Any]]:
    return [audit_run.audit_model(rank, world_size, request(*case[:3])) for case in CASES]


def test_no_layout_of_ours_stalls(on_ranks: Any) -> None:
    for (*case, by_design), ranks in zip(CASES, zip(*on_ranks(all_cases, 2, timeout=240), strict=True), strict=True):
        found = merge(ranks)
        assert [f for f in found if not f.allowed] == [], case
        assert sum(f.count for f in found) == by_design, case


def one_rank_looks(rank: int, world_size: int) -> list[Any]:
    original = block.MoEBlock.forward if hasattr(block, "MoEBlock") else None
    assert original is not None
    try:
        if rank == 1:

            def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                x.sum().item()
                return original(self, x, *args, **kwargs)

            block.MoEBlock.forward = forward  # type: ignore[method-assign]
        return audit_run.audit_model(rank, world_size, request("mixtral", Layout(1, 2, 2), Options()))
    finally:
        block.MoEBlock.forward = original  # type: ignore[method-assign]


def test_what_one_rank_does_is_found(on_ranks: Any) -> None:
    first, second = on_ranks(one_rank_looks, 2, timeout=120)
    assert first == []
    (found,) = merge([first, second])
    assert found.operator == "aten::_local_scalar_dense" and found.count == 6
    assert found.modules == ["model.layers.0.mlp", "model.layers.1.mlp"]
