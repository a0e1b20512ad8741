"""DeepSeek-V2-Lite on the meta device. Catches a config that is not the published model, a plan that does not cover
it, bytes per rank that do not add up over the ranks, and a peak of a step that is not what was measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_npu_tp.estimates.layer_memory import Shape, layer_rows
from lightning_npu_tp.estimates.model_sizes import ModelSizes
from lightning_npu_tp.estimates.step_memory import blocks, rank_memory
from lightning_npu_tp.models.families.deepseek_v2 import DEEPSEEK_V2
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.parallel.plan import match_plan

LITE = Path(__file__).parents[3] / "conf/model/deepseek_v2_lite.yaml"
PARAMETERS = 15_706_484_224
EXPERTS = 26 * 64 * 3 * 2048 * 1408


@pytest.fixture(scope="module")
def lite():
    node = yaml.safe_load(LITE.read_text())
    config = AutoConfig.for_model(node["architecture"], **node["config"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return shapes, match_plan(DEEPSEEK_V2.plan(config), shapes, family="deepseek_v2")


def test_the_lite_config_is_the_published_model(lite) -> None:
    shapes, _ = lite
    experts = {name: shape for name, shape in shapes.items() if ".mlp.experts." in name}
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == PARAMETERS
    assert sum(torch.Size(shape).numel() for shape in experts.values()) == EXPERTS


def test_bytes_per_rank_at_tensor_four(lite) -> None:
    shapes, rules = lite
    memory = rank_memory(shapes, rules, Layout.resolve(world=4), bytes_per_element=2)
    replicated = sum(torch.Size(shapes[name]).numel() for name, rule in rules.items() if rule.dim is None)
    assert memory.parameters == (PARAMETERS - replicated) // 4 + replicated
    assert memory.parameter_bytes == 2 * memory.parameters
    assert memory.total_bytes == 8 * memory.parameters
    assert 30e9 < memory.total_bytes < 32e9, "fits a card of 64 GB"


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_ranks_hold_everything_once_and_the_replicated_on_each(lite, ranks: int) -> None:
    shapes, rules = lite
    layout = Layout.resolve(world=ranks)
    replicated = sum(torch.Size(shapes[name]).numel() for name, rule in rules.items() if rule.dim is None)
    total = sum(rank_memory(shapes, rules, layout, rank=rank).parameters for rank in range(ranks))
    assert total == PARAMETERS + (ranks - 1) * replicated


ROOT = Path(__file__).parents[3]
MEASURED = json.loads((ROOT / "benchmarks/results/memory_arithmetic_sim_2026-11.json").read_text())


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("memory_arithmetic", ROOT / "benchmarks/memory_arithmetic.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("figure", MEASURED["bytes"], ids=lambda f: f"{f['model']}-{f['layout']}-{f['options']}")
def test_the_peak_of_a_step_is_what_an_allocator_was_seen_to_hold(benchmark: Any, figure: dict) -> None:
    peak = benchmark.predict(figure["model"], Layout(*figure["layout"]), figure["options"], torch.float32)
    measured = figure["measured"]
    assert peak.bytes == pytest.approx(max(measured.values()), rel=0.05)
    for part in ("forward", "backward", "optimizer"):
        assert getattr(peak, part) == pytest.approx(measured[part], rel=0.06), part
        # Another arithmetic has to be measured again.
        assert getattr(peak, part) == figure["predicted"][part], part


def test_tensors_count_as_the_blocks_that_an_allocator_cuts_for_them() -> None:
    mib = 2**20
    assert blocks([]) == 0 and blocks([1]) == blocks([480]) == 512 and blocks([512]) == 1024
    three = blocks([6 * mib] * 3)
    assert three == 3 * (6 * mib + 512)
    # The rest of their piece: what is left of it behind the fourth is too small for another block.
    assert blocks([*[6 * mib] * 3, 3 * mib // 2]) == 20 * mib
    # Behind a smaller one it is free, and the last of all does not fit into it.
    assert blocks([*[6 * mib] * 3, mib - 32]) == three + mib
    assert blocks([12 * mib]) == 12 * mib + 512 and blocks([23 * mib // 2]) == 12 * mib
    # From the smaller of two rests.
    assert blocks([12 * mib, 9 * mib, 3 * mib // 2]) == 12 * mib + 512 + 9 * mib + 512 + 2 * mib - 512


def test_more_recompute_and_more_ranks_need_less(benchmark: Any) -> None:
    alone = [
        benchmark.predict("long", Layout(1, 1, 1), {"recompute": recompute}, torch.float32).forward
        for recompute in ("none", "moe", "block")
    ]
    assert alone == sorted(alone, reverse=True) and len(set(alone)) == 3
    whole, sliced = (
        benchmark.predict("dense", Layout(1, 4, 4), {"sequence_parallel": slices}, torch.float32).forward
        for slices in (False, True)
    )
    assert sliced < whole < benchmark.predict("dense", Layout(1, 2, 2), {}, torch.float32).forward


@pytest.mark.parametrize("travel", [True, False])
def test_shared_experts_are_held_beside_routed_ones_where_rows_travel(benchmark: Any, travel: bool) -> None:
    architecture, values, batch, length = benchmark.MODELS["sparse"]
    sizes = ModelSizes.of(AutoConfig.for_model(architecture, **values))
    shape = Shape(sizes=sizes, layout=Layout(2, 1, 2), batch=batch, length=length, all_to_all=travel)
    rows = layer_rows(shape, sparse=True)
    routed = [number for number, row in enumerate(rows) if row.part == "experts"]
    (shared,) = [number for number, row in enumerate(rows) if row.kept == 4 * 128 * sizes.shared_width * 4]
    assert (shared < routed[0]) is travel and (shared > routed[-1]) is not travel
