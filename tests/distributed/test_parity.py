"""Any number of ranks computes what transformers computes in one process, in float64.

Catches a missing or doubled collective (a gradient off by the number of ranks, or partial), a shard
filled from the wrong slice, a loss normalised by the wrong count: loss, logits, every parameter's
gradient, the clip norm and the parameters after three AdamW steps are compared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config

from lightning_npu_tp.convert.convert import Options, conversion_of
from lightning_npu_tp.convert.data_parallel import reduce_gradients
from lightning_npu_tp.estimates.step_memory import rank_memory
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.tools.testing.models import (
    ReferenceStep,
    random_batch,
    tiny_deepseek_v2_config,
    tiny_deepseek_v2_grouped_config,
)
from lightning_npu_tp.tools.testing.operators import CountOperators
from lightning_npu_tp.tools.testing.reference import relative_difference
from lightning_npu_tp.tools.testing.sharded import Training, compare, sharded_model, train_alone, train_sharded

# Double rounding over a few thousand additions per element; a real mistake is 1e-3 and more.
TOLERANCE = 1e-10
CLIP_NORM = 0.05

CASES: dict[str, dict[str, Any]] = {
    "v2_lite": {},
    "q_lora_and_groups": {"grouped": True},
    "zero_token_experts": {"overrides": {"n_routed_experts": 32, "num_experts_per_tok": 1}, "shape": (1, 6)},
    "padded_batch": {"padding": True, "grouped": True},
    "uneven_vocabulary": {"overrides": {"vocab_size": 131}},
    "accumulation_of_three": {"micro_batches": 3, "padding": True},
    "biases_and_pad_token": {
        "overrides": {"attention_bias": True, "mlp_bias": True, "pad_token_id": 5},
        "grouped": True,
    },
    "tied_embeddings": {"overrides": {"tie_word_embeddings": True}},
    "all_layers_dense": {"overrides": {"first_k_dense_replace": 3}},
    "every_layer_moe": {"overrides": {"first_k_dense_replace": 0, "num_hidden_layers": 2}},
    "packed_documents": {"packed": True},
}


def _config(case: dict[str, Any]) -> DeepseekV2Config:
    make = tiny_deepseek_v2_grouped_config if case.get("grouped") else tiny_deepseek_v2_config
    return make(**case.get("overrides", {}))


def _batches(case: dict[str, Any], config: DeepseekV2Config) -> list[dict[str, Tensor]]:
    batch, length = case.get("shape", (3, 17))
    batches = [
        # Micro-batches of different lengths: a mean of means would differ from the mean over tokens.
        random_batch(config, batch, length + 3 * index, seed=index, padding=case.get("padding", False))
        for index in range(case.get("micro_batches", 1))
    ]
    if config.pad_token_id is not None:
        for item in batches:
            item["input_ids"][0, 3] = config.pad_token_id
    if case.get("packed"):
        for item in batches:
            item["position_ids"] = torch.cat([torch.arange(7), torch.arange(length - 7)]).expand(batch, -1)
    return batches


# (data, tensor, expert): every kind of layout that four ranks allow.
LAYOUTS = [(1, 1, 1), (1, 2, 2), (1, 4, 4), (2, 1, 2), (4, 1, 4), (4, 1, 2), (2, 2, 2), (2, 2, 4)]


def _training(case: dict[str, Any]) -> Training:
    config = _config(case)
    return Training(config=config, batches=_batches(case, config), clip_norm=CLIP_NORM)


def _expected(training: Training) -> ReferenceStep:
    expected = train_alone(training)
    assert expected.grad_norm > CLIP_NORM, "the case must clip"
    return expected


def _check(on_ranks: Any, training: Training, layout: Layout, options: Options, what: str) -> None:
    expected = _expected(training)
    differences: dict[str, float] = {}
    for rank, run in enumerate(on_ranks(train_sharded, layout.world, training, layout, options, timeout=120)):
        found = compare(run, expected, training)
        differences |= {f"rank {rank} {name}": difference for name, difference in found.items()}
    worst = max(differences, key=differences.__getitem__)
    print(f"{what}: worst relative difference {differences[worst]:.2e} ({worst})")
    assert differences[worst] <= TOLERANCE, f"{worst}: {differences[worst]:.3e}"


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_sharded_training_run_equals_transformers_in_one_process(on_ranks: Any, name: str, world_size: int) -> None:
    _check(on_ranks, _training(CASES[name]), Layout.resolve(world=world_size), Options(), f"{name} x{world_size}")


# Sequences of 17 and 19 positions: no number of tensor ranks divides them; 5 sequences: no number of data ranks does.
LAYOUT_CASES: dict[str, dict[str, Any]] = {
    "v2_lite": {"shape": (5, 17)},
    "everything": {
        "shape": (5, 19),
        "grouped": True,
        "padding": True,
        "micro_batches": 2,
        "overrides": {"attention_bias": True, "mlp_bias": True, "vocab_size": 131},
    },
}


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("sizes", LAYOUTS[1:])
@pytest.mark.parametrize("name", LAYOUT_CASES)
def test_every_layout_equals_one_process(on_ranks: Any, name: str, sizes: Any, sequence_parallel: bool) -> None:
    layout = Layout(*sizes)
    if sequence_parallel and layout.tensor == 1:
        # Nothing is sliced then; what remains to see is that the setting does no harm, once.
        sizes = LAYOUTS[3]
    options = Options(sequence_parallel=sequence_parallel)
    _check(on_ranks, _training(LAYOUT_CASES[name]), layout, options, f"{name} {sizes} {sequence_parallel}")


OPTIONS = {
    "replicate": ((2, 2, 2), Options(data_parallel="replicate")),
    "replicate_all_to_all": ((2, 2, 4), Options(data_parallel="replicate", sequence_parallel=True)),
    "all_to_all_over_tensor_ranks": ((1, 4, 4), Options(dispatch="all_to_all")),
    "all_to_all_over_slices": ((1, 4, 4), Options(dispatch="all_to_all", sequence_parallel=True)),
    "recompute_moe": ((2, 2, 4), Options(recompute="moe")),
    "recompute_block": ((2, 2, 4), Options(recompute="block")),
    "recompute_block_of_slices": ((2, 2, 2), Options(recompute="block", sequence_parallel=True)),
    "experts_not_divided": ((4, 1, 1), Options()),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_way_to_use_a_layout_equals_one_process(on_ranks: Any, name: str) -> None:
    sizes, options = OPTIONS[name]
    _check(on_ranks, _training(LAYOUT_CASES["everything"]), Layout(*sizes), options, name)


@pytest.mark.parametrize("sizes", [(4, 1, 1), (2, 1, 1), (2, 2, 2)])
def test_fewer_experts_than_replicas_and_tied_embeddings_over_data_ranks(on_ranks: Any, sizes: Any) -> None:
    few = {"n_routed_experts": 2, "num_experts_per_tok": 1, "tie_word_embeddings": True}
    layout = Layout(*sizes)
    _check(on_ranks, _training({"overrides": few, "shape": (5, 9)}), layout, Options(), f"two experts on {sizes}")


def reductions(rank: int, world_size: int) -> list[dict[str, int]]:
    """Collectives that reduce gradients over data ranks, in each of three micro-batches."""
    config = tiny_deepseek_v2_config()
    model, _ = sharded_model(config, Layout(2, 1, 1))
    counted = []
    for last in (False, False, True):
        reduce_gradients(model, last)
        loss = model(**random_batch(config, 2, 9, seed=0)).loss
        with CountOperators() as counter:
            loss.backward()
        counted.append(
            {name: n for name, n in counter.counts.items() if name.startswith("c10d::") and "reduce" in name}
        )
    return counted


def test_only_the_last_micro_batch_reduces_gradients(on_ranks: Any) -> None:
    for first, second, last in on_ranks(reductions, 2):
        assert not first and not second and last, (first, second, last)


def test_one_token_per_rank_and_ranks_without_rows(on_ranks: Any) -> None:
    """More expert ranks than picks: some receive nothing, and sequences shorter than the tensor ranks stay whole."""
    case = {"overrides": {"n_routed_experts": 32, "num_experts_per_tok": 1}, "shape": (2, 3)}
    for options in (Options(), Options(sequence_parallel=True), Options(dispatch="all_to_all")):
        _check(on_ranks, _training(case), Layout(1, 4, 4), options, "three tokens on four tensor ranks")
    _check(on_ranks, _training(case), Layout(2, 2, 4), Options(sequence_parallel=True), "three tokens, two ranks")


ROUTER_LOSSES = {"aux_loss_alpha": 0.05, "router_z_loss_coef": 0.01, "selection_bias": True}
ROUTER_LAYOUTS = {
    "replicated": ((1, 2, 2), Options()),
    "slices": ((1, 2, 2), Options(sequence_parallel=True)),
    "slices sent": ((1, 2, 2), Options(sequence_parallel=True, dispatch="all_to_all")),
    "data ranks": ((2, 1, 2), Options(recompute="moe")),
    "all, recomputed": ((2, 2, 4), Options(sequence_parallel=True, recompute="block")),
}


@pytest.mark.parametrize("seq_aux", [True, False])
@pytest.mark.parametrize("name", ROUTER_LAYOUTS)
def test_router_losses_and_counts_do_not_depend_on_the_layout(on_ranks: Any, name: str, seq_aux: bool) -> None:
    """The batch-wise loss is one over what a rank sees at once, so it is compared where ranks see the same."""
    sizes, options = ROUTER_LAYOUTS[name]
    layout = Layout(*sizes)
    if layout.data > 1 and not seq_aux:
        layout = Layout(1, layout.world, layout.world)
    config = tiny_deepseek_v2_config(**ROUTER_LOSSES, seq_aux=seq_aux)
    batches = [random_batch(config, 4, 17, seed=0, padding=layout.data == 1), random_batch(config, 4, 9, seed=1)]
    training = Training(config=config, batches=batches, clip_norm=CLIP_NORM, router_losses=True)
    (expected,) = on_ranks(train_sharded, 1, training, Layout(1, 1, 1))
    without = Training(config=config, batches=batches, clip_norm=CLIP_NORM)
    (plain,) = on_ranks(train_sharded, 1, without, Layout(1, 1, 1))
    router = "model.layers.2.mlp.gate.weight"
    assert relative_difference(plain.gradients[router], expected.gradients[router]) > 1e-3, "the losses must matter"
    for rank, run in enumerate(on_ranks(train_sharded, layout.world, training, layout, options, timeout=120)):
        assert torch.equal(run.tokens_per_expert, expected.tokens_per_expert)
        differences = compare(run, expected, training)
        worst = max(differences, key=differences.__getitem__)
        assert differences[worst] <= TOLERANCE, f"rank {rank}, {worst}: {differences[worst]:.3e}"
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
    picks = sum(int(mask.sum()) for mask in masks) * config.num_experts_per_tok
    assert expected.tokens_per_expert.sum(1).tolist() == [picks] * 2


@pytest.mark.parametrize("sizes", [(1, 2, 2), (2, 1, 2), (2, 2, 4)])
def test_the_same_run_twice_is_bit_identical(on_ranks: Any, sizes: tuple[int, int, int]) -> None:
    layout, options = Layout(*sizes), Options(sequence_parallel=True, recompute="block")
    first, second = (
        on_ranks(train_sharded, layout.world, _training(LAYOUT_CASES["v2_lite"]), layout, options)[0] for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.losses, second.losses, strict=True))
    assert all(torch.equal(value, second.parameters[name]) for name, value in first.parameters.items())


def held(rank: int, world_size: int, layout: Layout, how: Any) -> tuple[int, int]:
    # Fewer experts than replicas in the last layout.
    config = tiny_deepseek_v2_config(**({"n_routed_experts": 2} if layout.expert_replicas > 2 else {}))
    model, _ = sharded_model(config, layout, Options(data_parallel=how))
    report = conversion_of(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    memory = rank_memory(shapes, report.rules, layout, rank=rank, bytes_per_element=8, data_parallel=how)
    assert report.local_bytes == sum(8 * p.to_local().numel() for p in model.parameters())
    return report.local_parameters, memory.parameters


@pytest.mark.parametrize("how", ["shard", "replicate"])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 2, 4), (4, 1, 1)])
def test_arithmetic_of_what_a_rank_holds_is_what_it_holds(on_ranks: Any, sizes: Any, how: str) -> None:
    layout = Layout(*sizes)
    results = on_ranks(held, layout.world, layout, how)
    assert all(has == counted for has, counted in results), results
    assert how == "replicate" or max(results)[0] < 1.1 * min(results)[0], f"the ranks hold alike much: {results}"
