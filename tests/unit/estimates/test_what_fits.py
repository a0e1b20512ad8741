"""What would have fitted. Catches sizes read wrongly from an error's text, activations that are not what layers keep, a
suggestion that would not fit, cuts a head or is not the nearest.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from memory_texts import CUDA_TEXT, NPU_TEXT
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV2Config

from lightning_npu_tp.estimates.layer_memory import FUSED
from lightning_npu_tp.estimates.model_sizes import ModelSizes
from lightning_npu_tp.estimates.what_fits import (
    Run,
    activations,
    kept_for_the_run,
    layer_bytes,
    needed,
    read_numbers,
    sizes_of,
    suggestions,
)
from lightning_npu_tp.models.families.deepseek_v2 import DEEPSEEK_V2
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.parallel.plan import match_plan

ROOT = Path(__file__).parents[3]
GIB = 2**30


def test_sizes_are_read_from_both_allocators_texts() -> None:
    npu, cuda = read_numbers(NPU_TEXT), read_numbers(CUDA_TEXT)
    assert (npu.requested, npu.total, npu.free) == (2 * GIB, int(61.25 * GIB), 764 * 2**20)
    assert (npu.allocated, npu.reserved) == (int(40.5 * GIB), int(44.25 * GIB))
    # Of 61.25 GiB other processes and libraries hold what is neither free nor reserved.
    assert npu.usable == int(44.25 * GIB) + 764 * 2**20
    assert (cuda.requested, cuda.total, cuda.free) == (GIB // 2, int(79.25 * GIB), GIB // 4)
    assert (cuda.allocated, cuda.reserved) == (77 * GIB, int(78.25 * GIB))
    assert npu.in_pieces and cuda.in_pieces and not replace(cuda, requested=2 * GIB).in_pieces
    full = read_numbers(NPU_TEXT.replace("764.00 MiB free", "0 bytes free"))
    assert full.free == 0 and full.usable == int(44.25 * GIB)
    nothing = read_numbers("CUDA error: out of memory")
    assert nothing.usable is None and not nothing.in_pieces


MEASURED = json.loads((ROOT / "benchmarks/results/recompute_memory_cpu_2026-11.json").read_text())


@pytest.mark.parametrize("figure", MEASURED["bytes"], ids=lambda f: f"{f['sequences']}-{f['recompute']}")
def test_a_layers_activations_are_those_that_were_measured(figure: dict) -> None:
    run = Run(
        sizes=ModelSizes.of(DeepseekV2Config(**MEASURED["shape"])),
        shapes={},
        rules={},
        units={},
        layout=Layout(data=1, tensor=2, expert=2),
        batch=2,
        length=1024,
        activation_bytes=2,
        sequence_parallel=figure["sequences"] == "sliced",
    )
    counted = layer_bytes(run, sparse=True, recompute=figure["recompute"])
    # Statistics of norms and of attention, the picks and their order are left out: 2.5 MB of up to 101, never less.
    assert 0 < figure["kept"] - counted < 2.6e6


@pytest.fixture(scope="module")
def lite() -> Run:
    node = yaml.safe_load((ROOT / "conf/model/deepseek_v2_lite.yaml").read_text())
    config = AutoConfig.for_model(node["architecture"], **node["config"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return Run(
        sizes=ModelSizes.of(config),
        shapes=shapes,
        rules=match_plan(DEEPSEEK_V2.plan(config), shapes, family="deepseek_v2"),
        units=DEEPSEEK_V2.units(config),
        layout=Layout(data=1, tensor=4, expert=4),
        batch=8,
        length=4096,
        bytes_per_element=2,
        activation_bytes=2,
    )


def test_the_largest_equal_parts_of_the_batch_that_fit_are_named(lite: Run) -> None:
    nine = replace(lite, batch=9)
    # Four would fit, but no number of them is nine.
    usable = int(needed(replace(lite, batch=4)) / 0.95) + 1
    text = next(line for line in suggestions(nine, usable) if line.startswith("data.batch_size"))
    assert text.startswith("data.batch_size=3 with trainer.accumulate_grad_batches=3 times")
    assert f"{needed(replace(lite, batch=3)) / GIB:.1f} GiB" in text
    exact = needed(replace(lite, batch=4))
    tight = next(line for line in suggestions(lite, exact + 1) if line.startswith("data.batch_size"))
    assert tight.startswith("data.batch_size=2 "), "no allocator can use the last byte"


def test_recompute_and_length_are_named_where_they_are_enough(lite: Run) -> None:
    # One sequence: no smaller batch.
    run = replace(lite, batch=1, length=32768)
    usable = int(needed(replace(run, recompute="block")) / 0.95) + 1
    lines = suggestions(run, usable)
    assert lines[0].startswith("strategy.recompute=") and not any("batch_size" in line for line in lines)
    shorter = next(line for line in lines if line.startswith("data.sequence_length="))
    length = int(shorter.split("=")[1].split(" ")[0])
    assert needed(replace(run, length=length)) <= 0.95 * usable < needed(replace(run, length=2 * length))
    assert not any("recompute" in line for line in suggestions(replace(run, recompute="block"), usable))


def test_where_no_batch_is_small_enough_a_layout_with_the_fewest_devices_is_named(lite: Run) -> None:
    # 15.7 G parameters with gradients and states in bf16 are 117 GiB: not on two devices of 36.
    run = replace(lite, layout=Layout(data=1, tensor=2, expert=2), batch=1, length=256)
    usable = 36 * GIB
    assert kept_for_the_run(run) > usable
    lines = suggestions(run, usable)
    assert len(lines) == 1 and "on 4 devices" in lines[0]
    numbers = [int(part) for part in lines[0].split("=")[1].split(" on ")[0].replace("and", ",").split(",")]
    data, tensor, expert = numbers
    assert data * tensor == 4 and 16 % tensor == 0 and 64 % expert == 0 and expert % tensor == 0
    assert needed(replace(run, layout=Layout(data=data, tensor=tensor, expert=expert))) <= 0.95 * usable


def test_no_layout_that_would_cut_a_head_or_an_expert_is_named(lite: Run) -> None:
    # 14 devices: 16 heads are not split by 7, nor 64 experts.
    run = replace(lite, layout=Layout(data=14, tensor=1, expert=1), batch=16, length=256)
    for usable in (4 * GIB, 8 * GIB, 12 * GIB):
        for line in suggestions(run, usable):
            if "parallel_size" in line:
                text = line.split("=")[1].split(" (")[0].split(" on ")[0].split(" with ")[0].replace("and", ",")
                data, tensor, expert = (int(part) for part in text.split(","))
                assert 16 % tensor == 0 and 64 % expert == 0 and expert % tensor == 0, line
    # Three heads: no tensor rank beside the first, though two would fit.
    run = replace(
        run,
        units={"head": 3, "expert": 64},
        layout=Layout(data=1, tensor=1, expert=1),
        data_parallel="replicate",
        batch=4,
    )
    usable = int(needed(replace(run, layout=Layout(data=1, tensor=2, expert=2))) / 0.95) + 1
    (line,) = [line for line in suggestions(run, usable) if "parallel_size" in line]
    assert "_size=4, 1 and 4 on 4 devices with data.batch_size=1 " in line
    # A step of three sequences is not divided by four ranks, nor is it another one.
    assert not any("_size=4" in line for line in suggestions(replace(run, batch=3), usable))


def test_a_layout_of_fewer_data_ranks_takes_their_sequences(lite: Run) -> None:
    run = replace(lite, layout=Layout(data=2, tensor=1, expert=1), batch=2, length=256, data_parallel="replicate")
    other = replace(run, layout=Layout(data=1, tensor=2, expert=2))
    for batch, names in ((4, True), (2, False)):
        lines = suggestions(run, int(needed(replace(other, batch=batch)) / 0.95) + 1)
        assert any("_size=1, 2 and 2 with data.batch_size=4 (" in line for line in lines) == names, lines


def test_half_the_bytes_are_offered_to_a_run_in_float32(lite: Run) -> None:
    run = replace(lite, bytes_per_element=4, activation_bytes=4, batch=1, length=256)
    for moments, states in {"float32": 5, "bfloat16": 3}.items():
        fits = needed(replace(run, bytes_per_element=2, activation_bytes=2, optimizer_states=states))
        # Weights of two bytes alone would fit too, and hardly train.
        wanted = f"trainer.precision=bf16-true with optimizer=adamw_bf16 and optimizer.moments={moments} (about "
        assert any(line.startswith(wanted) for line in suggestions(run, int(fits / 0.95) + 1))
    assert not any("precision" in line for line in suggestions(lite, 10**15))


def test_what_was_seen_raises_the_prediction_in_proportion(lite: Run) -> None:
    more = replace(lite, seen=2 * activations(lite))
    assert needed(more) - needed(lite) == activations(lite)
    usable = int(needed(replace(lite, batch=4)) / 0.95) + 1
    seen, unseen = (
        next(line for line in suggestions(run, usable) if line.startswith("data.batch_size")) for run in (more, lite)
    )
    assert unseen.startswith("data.batch_size=4 ") and seen.startswith("data.batch_size=2 ")


def test_data_ranks_add_the_layer_that_is_gathered(lite: Run) -> None:
    def beside(run: Run) -> int:
        return needed(run) - kept_for_the_run(run) - activations(run)

    spread = replace(lite, layout=Layout(data=4, tensor=1, expert=1))
    experts = 64 * 3 * 2048 * 1408 * 2
    assert 2 * experts < beside(spread) < 2.2 * experts
    # FSDP copies replicas too; experts that one rank alone has are no replicas, and not gathered either.
    replicas, total = replace(spread, data_parallel="replicate"), 2 * 15_706_484_224
    assert beside(replicas) == total
    alone = Layout(data=4, tensor=1, expert=4)
    assert beside(replace(replicas, layout=alone)) == total - 26 * experts
    embedding_and_head = 2 * 102400 * 2048 * 2
    assert beside(replace(spread, layout=alone)) == pytest.approx(2 * embedding_and_head, rel=1e-3)


@pytest.mark.parametrize("fused", [frozenset(), FUSED])
def test_gradients_of_several_micro_batches_wait_whole(lite: Run, fused: frozenset[str]) -> None:
    spread = replace(lite, layout=Layout(data=4, tensor=1, expert=1), fused=fused, length=256, batch=2)
    waiting = needed(replace(spread, accumulates=True)) - needed(spread)
    whole = 2 * 15_706_484_224
    assert waiting == pytest.approx(whole * 3 / 4, rel=0.1)
    # So a smaller batch with micro-batches is not offered where it would need more.
    usable = int(needed(replace(spread, batch=1)) / 0.95) + 1
    assert not any(line.startswith("data.batch_size") for line in suggestions(spread, usable))
    assert any(line.startswith("data.batch_size=1 ") for line in suggestions(spread, int(usable + 1.1 * waiting)))
    one = replace(lite, layout=Layout(data=1, tensor=4, expert=4), length=256, batch=2)
    assert needed(replace(one, accumulates=True)) == needed(one)


def test_a_config_that_is_no_decoders_has_no_sizes() -> None:
    assert sizes_of(object()) is None
