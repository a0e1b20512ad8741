"""The reference, the tiny models and the operator counter that all other proofs stand on.

Catches: a float64 reference that still rounds to float32 somewhere, a reference step that averages
means, a relative difference that takes NaN for equality, and an operator counter that is blind to a
stall.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_npu_tp.tools.testing.models import (
    IGNORED_LABEL,
    random_batch,
    reference_model,
    reference_step,
    tiny_deepseek_v2_config,
    tiny_deepseek_v2_grouped_config,
)
from lightning_npu_tp.tools.testing.operators import DYNAMIC_SHAPE, HOST_SYNC, CountOperators
from lightning_npu_tp.tools.testing.reference import assert_close_relative, float64_reference, relative_difference


def test_every_request_for_float32_becomes_float64_inside_and_stays_itself_outside():
    one = torch.ones(2, dtype=torch.float64)
    requests = [
        lambda: one.float(),
        lambda: one.to(torch.float32),
        lambda: one.to(dtype=torch.float32),
        lambda: one.type(torch.float32),
        lambda: one.type("torch.FloatTensor"),
        lambda: F.softmax(one, dim=0, dtype=torch.float32),
        lambda: one.softmax(dim=0, dtype=torch.float32),
        lambda: one.new_zeros(2, dtype=torch.float32),
        lambda: torch.arange(2, dtype=torch.float),
        lambda: torch.tensor([1, 2]) / 3,
        lambda: torch.nn.Linear(2, 2).float().weight,
        lambda: torch.polar(one.float(), one.float()).abs(),
        lambda: one.to(torch.complex64).abs(),
        lambda: one.cfloat().abs(),
    ]
    for request in requests:
        assert request().dtype == torch.float32 or "polar" in request.__code__.co_names
    with float64_reference():
        assert [request().dtype for request in requests] == [torch.float64] * len(requests)
    assert one.float().dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make_config", [tiny_deepseek_v2_config, tiny_deepseek_v2_grouped_config])
@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
def test_finite_differences_of_the_reference_agree_with_autograd_for_every_parameter(make_config, attention, padding):
    config = make_config()
    model = reference_model(config, attention=attention)
    batch = random_batch(config, 2, 12, seed=0, padding=padding)
    step = 1e-5
    with float64_reference():
        output = model(**batch)
        output.loss.backward()
        assert output.loss.dtype == output.logits.dtype == torch.float64
        for name, parameter in model.named_parameters():
            slope = parameter.grad.norm()
            assert slope > 1e-3, f"{name} does not take part"
            direction = parameter.grad / slope
            with torch.no_grad():
                above = model_at(model, batch, parameter, direction, step)
                below = model_at(model, batch, parameter, direction, -step)
            # Truncation and rounding leave about 1e-9; a single float32 rounding leaves 1e-2.
            assert_close_relative((above - below) / (2 * step), slope, 1e-7, name)


def model_at(model, batch, parameter, direction, step):
    before = parameter.clone()
    parameter.add_(direction, alpha=step)
    loss = model(**batch).loss
    parameter.copy_(before)
    return loss


def test_without_the_reference_mode_the_double_model_is_not_a_float64_one():
    config = tiny_deepseek_v2_config()
    model = reference_model(config)
    batch = random_batch(config, 2, 12, seed=0)
    with float64_reference():
        expected = model(**batch).loss
    plain = model(**batch).loss
    assert plain.dtype == torch.float32
    assert relative_difference(plain, expected) > 1e-10


def test_relative_difference_is_the_norm_of_the_difference_and_infinite_for_nan():
    expected = torch.tensor([3.0, 4.0])
    assert relative_difference(expected + torch.tensor([0.0, 0.5]), expected) == pytest.approx(0.1)
    assert relative_difference(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_difference(torch.ones(2), torch.zeros(2)) > 1e300
    assert relative_difference(torch.tensor([3.0, math.nan]), expected) == math.inf
    assert relative_difference(expected, torch.tensor([3.0, math.inf])) == math.inf
    assert relative_difference(torch.ones(1, dtype=torch.complex64) * 1j, torch.ones(1)) == pytest.approx(2**0.5)
    with pytest.raises(AssertionError, match="shape"):
        relative_difference(torch.ones(1, 2), expected)
    with pytest.raises(AssertionError, match="the loss: relative difference 0.1 exceeds 0.01"):
        assert_close_relative(expected * 1.1, expected, 0.01, "the loss")
    assert assert_close_relative(expected, expected, 0.0, "itself") == 0


def test_the_reference_step_is_adamw_on_the_loss_over_all_tokens_of_all_micro_batches():
    config = tiny_deepseek_v2_config()
    model = reference_model(config)
    batches = [random_batch(config, 2, 8, seed=1), random_batch(config, 3, 8, seed=2, padding=True)]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    result = reference_step(model, batches, steps=2, learning_rate=1e-2, clip_norm=0.5)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

    labels = torch.cat([batch["labels"][:, 1:].flatten() for batch in batches])
    logits = torch.cat([logits[:, :-1].flatten(0, 1) for logits in result.logits])
    assert_close_relative(result.loss, F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL), 1e-14, "loss")
    squares = sum(gradient.square().sum() for gradient in result.gradients.values())
    assert_close_relative(result.grad_norm, squares.sqrt(), 1e-14, "gradient norm")
    assert result.grad_norm > 0.5
    assert result.losses[1] < result.losses[0]
    assert result.gradients.keys() == result.parameters.keys() == before.keys()
    unclipped = reference_step(model, batches, steps=2, learning_rate=1e-2)
    assert relative_difference(unclipped.parameters["lm_head.weight"], result.parameters["lm_head.weight"]) > 1e-10


def test_tiny_models_have_every_part_of_the_real_ones():
    lite, grouped = tiny_deepseek_v2_config(), tiny_deepseek_v2_grouped_config()
    names = [{name for name, _ in reference_model(config).named_parameters()} for config in (lite, grouped)]
    assert "model.layers.0.mlp.gate_proj.weight" in names[0] and "model.layers.1.mlp.gate.weight" in names[0]
    assert any("q_proj" in name for name in names[0]) and any("q_a_layernorm" in name for name in names[1])
    assert (grouped.topk_method, grouped.n_group, grouped.topk_group) == ("group_limited_greedy", 4, 2)
    assert lite.rope_parameters["rope_type"] == "yarn" and lite.rope_parameters["factor"] == 40
    assert tiny_deepseek_v2_config(vocab_size=130, n_group=2).vocab_size == 130
    # Two configurations share no table: transformers writes into it.
    lite.rope_parameters["factor"] = 1.0
    assert tiny_deepseek_v2_config().rope_parameters["factor"] == 40


def test_a_padded_batch_ends_each_row_earlier_and_labels_no_padding():
    batch = random_batch(tiny_deepseek_v2_config(), 3, 10, seed=0, padding=True)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert len(set(lengths)) == 3 and 0 < min(lengths) and max(lengths) < 10
    padding = batch["attention_mask"] == 0
    assert (batch["labels"][padding] == IGNORED_LABEL).all()
    assert torch.equal(batch["labels"][~padding], batch["input_ids"][~padding])


# ------------------------------------------------------------------------------------ operators

INDEX = torch.tensor([0, 2, 1, 1, 0, 2])
ROWS = torch.arange(18.0).reshape(6, 3)
MASK = INDEX > 0


def assign(index):
    ROWS.clone()[index] = 0.0


STALLS = {
    "item": (HOST_SYNC, lambda: ROWS.sum().item()),
    "any": (HOST_SYNC, lambda: bool(MASK.any())),
    "equal": (HOST_SYNC, lambda: torch.equal(ROWS, ROWS)),
    "allclose": (HOST_SYNC, lambda: torch.allclose(ROWS, ROWS)),
    "tolist": (HOST_SYNC, lambda: INDEX.tolist()),
    "numpy": (HOST_SYNC, lambda: INDEX.numpy()),
    "array": (HOST_SYNC, lambda: INDEX.__array__()),
    "cpu": (HOST_SYNC, lambda: INDEX.cpu()),
    "to_cpu": (HOST_SYNC, lambda: INDEX.to("cpu")),
    "to_cpu_by_name": (HOST_SYNC, lambda: INDEX.to(device="cpu")),
    "slice": (HOST_SYNC, lambda: ROWS[: INDEX[1]]),
    "one_hot": (HOST_SYNC, lambda: F.one_hot(INDEX)),
    "nonzero": (DYNAMIC_SHAPE, lambda: MASK.nonzero()),
    "where": (DYNAMIC_SHAPE, lambda: torch.where(MASK)),
    "masked_select": (DYNAMIC_SHAPE, lambda: ROWS.masked_select(ROWS > 0)),
    "unique": (DYNAMIC_SHAPE, lambda: INDEX.unique()),
    "unique_consecutive": (DYNAMIC_SHAPE, lambda: INDEX.unique_consecutive()),
    "unique_dim": (DYNAMIC_SHAPE, lambda: ROWS.unique(dim=0)),
    "bincount": (DYNAMIC_SHAPE, lambda: torch.bincount(INDEX)),
    "bool_index": (DYNAMIC_SHAPE, lambda: ROWS[MASK]),
    "byte_index": (DYNAMIC_SHAPE, lambda: ROWS[:, torch.tensor([1, 0, 1], dtype=torch.bool)]),
    "bool_assignment": (DYNAMIC_SHAPE, lambda: assign(MASK)),
    "repeat_interleave": (DYNAMIC_SHAPE, lambda: ROWS.repeat_interleave(INDEX, dim=0)),
}
HARMLESS = {
    "int_index": lambda: ROWS[INDEX],
    "int_assignment": lambda: assign(INDEX),
    "other_device": lambda: ROWS.to(INDEX.device) + 1,
    "sized_repeat_interleave": lambda: ROWS.repeat_interleave(INDEX, dim=0, output_size=6),
    "sort": lambda: torch.sort(INDEX),
    "masked_fill": lambda: ROWS.masked_fill(ROWS > 0, 0.0),
    "topk": lambda: ROWS.topk(2),
}


@pytest.mark.parametrize("name", STALLS)
def test_the_counter_sees_a_stall_and_the_line_that_caused_it(name):
    kind, stall = STALLS[name]
    with CountOperators() as counter:
        stall()
    assert counter.found(), f"{name} went unseen"
    assert {sighting.kind for sighting in counter.found()} == {kind}
    assert all(f"{__file__}:" in sighting.where for sighting in counter.found())
    assert counter.found(exclude=[__file__]) == []


@pytest.mark.parametrize("name", HARMLESS)
def test_the_counter_takes_no_static_operator_for_a_stall(name):
    with CountOperators() as counter:
        HARMLESS[name]()
    assert [str(sighting) for sighting in counter.found()] == []
    assert counter.counts.total() > 0


class StallsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient.sum().item()
        return gradient


def test_the_counter_sees_the_backward_pass():
    tensor = torch.ones(2, requires_grad=True)
    with CountOperators() as counter:
        StallsInBackward.apply(tensor).sum().backward()
    (sighting,) = counter.found()
    assert "in backward: gradient.sum().item()" in sighting.where
    assert str(sighting).startswith("host sync: aten::_local_scalar_dense at ")


def test_the_counter_finds_what_transformers_eager_experts_do():
    config = tiny_deepseek_v2_config()
    model, batch = reference_model(config), random_batch(config, 1, 4, seed=0)
    with float64_reference(), CountOperators() as counter:
        model(**batch).loss.backward()
    assert any("deepseek_v2" in sighting.where for sighting in counter.found())
    assert counter.counts["aten::mm"] > 0


def test_what_a_backward_pass_asks_the_host_is_seen_too() -> None:
    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            grad.tolist(), grad.sum().item()
            return grad

    output = Asks.apply(torch.ones(2, requires_grad=True)).sum()
    with CountOperators() as counter:
        output.backward()
    assert sorted(sighting.operator for sighting in counter.found()) == ["Tensor.tolist", "aten::_local_scalar_dense"]
