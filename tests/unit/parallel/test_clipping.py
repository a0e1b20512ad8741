"""Gradient norms and clipping in one process, against torch's own.

Catches: a wrong power, a rounding of the norm to 16 bits, a gradient left out or scaled twice, and a
read on the host. What is shared between ranks is in tests/distributed/test_clipping_ranks.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.parallel.clipping import clip_grad_norm_, clip_grad_value_, local_gradients, total_grad_norm
from lightning_npu_tp.tools.testing.operators import CountOperators


def parameters(dtypes=(torch.float32,) * 3, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    made = []
    for shape, dtype in zip(((4, 5), (3,), (2, 2, 2)), dtypes, strict=True):
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        parameter.grad = (scale * torch.randn(shape, generator=generator)).to(dtype)
        made.append(parameter)
    # Never used by this step.
    return [*made, torch.nn.Parameter(torch.zeros(7))]


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf, 0.5])
def test_the_norm_and_the_clipped_gradients_are_torchs(norm_type):
    ours, theirs = parameters(), parameters()
    for max_norm in (0.1, 1e6):
        total = clip_grad_norm_(ours, max_norm, norm_type)
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
        for our, their in zip(ours[:3], theirs[:3], strict=True):
            torch.testing.assert_close(our.grad, their.grad, rtol=1e-6, atol=0)


def test_a_float64_norm_is_a_float64_norm():
    made = parameters((torch.float64,) * 3)
    squares = math.fsum(value**2 for parameter in made[:3] for value in parameter.grad.flatten().tolist())
    total = total_grad_norm(made)
    assert total.dtype == torch.float64
    assert abs(total.item() - math.sqrt(squares)) <= 1e-15 * math.sqrt(squares)


def test_sixteen_bit_gradients_are_measured_in_float32():
    made = parameters((torch.bfloat16, torch.float32, torch.float16))
    total = total_grad_norm(made)
    assert total.dtype == torch.float32
    squares = sum(parameter.grad.double().square().sum() for parameter in made[:3])
    torch.testing.assert_close(total.double(), squares.sqrt(), rtol=1e-6, atol=0)
    clip_grad_norm_(made, 0.5)
    assert [parameter.grad.dtype for parameter in made[:3]] == [torch.bfloat16, torch.float32, torch.float16]
    torch.testing.assert_close(total_grad_norm(made), torch.tensor(0.5), rtol=1e-3, atol=0)


def test_values_are_clamped_in_place():
    made = parameters()
    kept = [parameter.grad for parameter in made[:3]]
    expected = [gradient.clamp(-0.3, 0.3) for gradient in kept]
    clip_grad_value_(made, 0.3)
    assert all(torch.equal(gradient, want) for gradient, want in zip(kept, expected, strict=True))
    assert all(parameter.grad is gradient for parameter, gradient in zip(made[:3], kept, strict=True))


def test_parameters_may_come_from_a_generator():
    made = parameters()
    clip_grad_norm_(iter(made), 0.1)
    torch.testing.assert_close(total_grad_norm(iter(made)), torch.tensor(0.1), rtol=1e-4, atol=0)
    assert len(local_gradients(iter(made))) == 3


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_bad_gradients_show_in_the_norm(norm_type):
    made = parameters()
    made[0].grad[0, 0] = math.nan
    assert not math.isfinite(total_grad_norm(made, norm_type).item())


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_without_gradients_the_norm_is_zero(norm_type):
    empty = torch.nn.Parameter(torch.zeros(0, 3))
    empty.grad = torch.zeros(0, 3)
    for none in ([], [torch.nn.Parameter(torch.ones(2))], [empty]):
        assert clip_grad_norm_(none, 1.0, norm_type).item() == 0.0
        clip_grad_value_(none, 1.0)


@pytest.mark.parametrize("norm_type", [0.0, -1.0, math.nan])
def test_what_is_no_norm_is_refused(norm_type):
    with pytest.raises(ConfigError, match="is not the p of a norm"):
        total_grad_norm(parameters(), norm_type)


def test_clipping_reads_nothing_on_the_host():
    made = parameters()
    with CountOperators() as counter:
        clip_grad_norm_(made, 1.0)
        clip_grad_norm_(made, 1.0, math.inf)
        clip_grad_value_(made, 0.1)
    assert [str(sighting) for sighting in counter.found()] == []
    assert counter.counts.total() > 0
