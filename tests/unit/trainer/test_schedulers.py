"""Catches: a schedule that is off by one step, never reaches its ends, or stops early; weight decay on norms."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_npu_tp.errors import ConfigError
from lit_models.causal_lm import LitCausalLM
from lit_models.optim import constant, cosine, weight_decay_groups


def rates(build, steps: int) -> list[float]:
    """Learning rate of each optimizer step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = build(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_cosine_climbs_to_the_peak_and_ends_at_its_minimum_on_the_last_step() -> None:
    found = rates(partial(cosine, total_steps=11, warmup_steps=4, min_lr_ratio=0.25), 13)
    assert found[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert found[7] == pytest.approx(2 * (0.25 + 0.75 * 0.5))  # half-way between step 4 and step 10
    assert found[10] == pytest.approx(0.5)
    assert found[11:] == pytest.approx([0.5, 0.5])
    assert all(a > b for a, b in zip(found[4:10], found[5:11], strict=True))


def test_cosine_without_warm_up_starts_at_the_peak() -> None:
    found = rates(partial(cosine, total_steps=3, min_lr_ratio=0.0), 3)
    assert found == pytest.approx([2.0, 1.0, 0.0])


def test_constant_stays_after_its_warm_up() -> None:
    assert rates(partial(constant, warmup_steps=1), 4) == pytest.approx([1.0, 2.0, 2.0, 2.0])


@pytest.mark.parametrize("build", [constant, partial(cosine, total_steps=5)])
def test_a_negative_warm_up_is_refused(build) -> None:
    with pytest.raises(ConfigError, match="scheduler.warmup_steps=-1"):
        rates(partial(build, warmup_steps=-1), 1)


def test_a_trial_run_shorter_than_its_warm_up_ends_within_it() -> None:
    assert rates(partial(cosine, total_steps=2, warmup_steps=3), 2) == pytest.approx([0.5, 1.0])


def test_a_minimum_outside_of_its_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="min_lr_ratio=2"):
        rates(partial(cosine, total_steps=5, min_lr_ratio=2), 1)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(2, 2)
        self.input_layernorm = nn.LayerNorm(2)
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)


def test_norms_and_biases_do_not_decay() -> None:
    parts = Parts()
    decayed, exempt = weight_decay_groups(parts.named_parameters())
    assert [id(p) for p in decayed["params"]] == [id(parts.proj.weight)]
    norm = parts.input_layernorm
    assert {id(p) for p in exempt["params"]} == {id(p) for p in (parts.proj.bias, norm.weight, norm.bias)}
    assert "weight_decay" not in decayed and exempt["weight_decay"] == 0.0


def test_a_group_without_parameters_is_left_out() -> None:
    (group,) = weight_decay_groups(nn.Linear(2, 2, bias=False).named_parameters())
    assert "weight_decay" not in group


def configured(scheduler, steps: float):
    """What LitCausalLM makes of a scheduler in a run of that many steps."""
    module = LitCausalLM(
        architecture="deepseek_v2", config={}, optimizer=partial(torch.optim.AdamW, lr=1.0), scheduler=scheduler
    )
    module.model = Parts()
    module._trainer = SimpleNamespace(estimated_stepping_batches=steps)
    return module.configure_optimizers()


def test_the_schedule_takes_the_steps_of_the_run_and_is_stepped_with_the_optimizer() -> None:
    made = configured(partial(cosine, total_steps=None, min_lr_ratio=0.0), 7)["lr_scheduler"]
    assert made["interval"] == "step"
    assert made["scheduler"].lr_lambdas[0](6) == pytest.approx(0.0)
    assert made["scheduler"].lr_lambdas[0](3) == pytest.approx(0.5)


def test_steps_given_to_the_schedule_win_over_those_of_the_run() -> None:
    made = configured(partial(cosine, total_steps=100, min_lr_ratio=0.0), 7)["lr_scheduler"]
    assert made["scheduler"].lr_lambdas[0](6) == pytest.approx(0.5 * (1 + math.cos(math.pi * 6 / 99)))


def test_a_scheduler_that_counts_no_steps_is_left_alone() -> None:
    made = configured(partial(torch.optim.lr_scheduler.StepLR, step_size=3), 7)["lr_scheduler"]
    assert made["scheduler"].step_size == 3


def test_a_run_without_an_end_cannot_have_a_cosine() -> None:
    with pytest.raises(ConfigError, match="no end.*trainer.max_steps"):
        configured(cosine, float("inf"))


def test_without_a_scheduler_there_is_just_the_optimizer() -> None:
    assert isinstance(configured(None, 7), torch.optim.AdamW)
