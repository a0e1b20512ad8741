"""The card's kernels against the reference. Catches one that computes something else, or falls to the reference.

In float32 every gradient is held against the CPU in float64; in bfloat16, where rounding decides, the card's
kernels must not be farther from float64 than plain PyTorch on the same card is.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cards import FLOAT32, distance
from torch import Tensor

from lightning_npu_tp.convert.convert import convert
from lightning_npu_tp.devices.device import backend_for
from lightning_npu_tp.kernels import npu_limits, select
from lightning_npu_tp.models.moe.router import TopKRouter
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes
from lightning_npu_tp.tools.testing.models import random_batch, reference_model, tiny_config

# torch_npu's own deepcopy of a tensor asks torch for what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
OPERATIONS = ("grouped_matmul", "permute", "swiglu", "rms_norm", "rotary", "attention")
PLAIN = dict.fromkeys(OPERATIONS, "reference")


@pytest.fixture(autouse=True)
def one_rank(card: str, runtime: Any) -> Iterator[None]:
    runtime.set_device(0)
    dist.init_process_group(backend_for(card), store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def converted(model: Any, device: str, overrides: dict[str, str] | None = None) -> Any:
    model, meshes = copy.deepcopy(model), Meshes.build(Layout(1, 1, 1), device)
    kernels = select(device, overrides)
    convert(
        model,
        meshes=meshes,
        groups=Groups(meshes),
        kernels=kernels,
        device=torch.device(device),
        dtype=None,
        seed=0,
    )
    return model.train()


def gradients(model: Any, device: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    output = model(**{name: value.to(device) for name, value in batch.items()})
    (output.loss if output.aux_loss is None else output.loss + output.aux_loss).backward()
    return {name: p.grad.to_local() for name, p in model.named_parameters() if p.grad is not None}


def repeating(model: Any, choices: list[Tensor]) -> Any:
    """Near-ties of the router decided as in the exact model, or another function would be compared."""
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    for router, chosen in zip(routers, choices, strict=True):
        router.register_forward_pre_hook(
            lambda module, args, kwargs, chosen=chosen: (args, {**kwargs, "experts_TK": chosen.to(args[0].device)}),
            with_kwargs=True,
        )
    return model


def choices_of(model: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(lambda module, args, routing: found.append(routing.experts_TK))
    return found


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe"])
def test_float32_gradients_are_the_cpus(card, family, caplog):
    config = tiny_config(family)
    model, batch = reference_model(config), random_batch(config, 2, 12, seed=0, padding=True)
    exact = converted(model, "cpu")
    choices = choices_of(exact)
    wanted = gradients(exact, "cpu", batch)
    npu_limits.forget()
    with caplog.at_level(logging.WARNING):
        got = gradients(repeating(converted(model.float(), card), choices), card, batch)
    assert not [record for record in caplog.records if "the reference computes instead" in record.getMessage()]
    # TF32 is off by default, so a card's float32 is that.
    assert {
        name: distance(got[name], wanted[name]) for name in wanted if distance(got[name], wanted[name]) > FLOAT32
    } == {}


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe"])
def test_bfloat16_gradients_are_as_near_as_plain_pytorchs(card, family):
    config = tiny_config(family)
    model, batch = reference_model(config), random_batch(config, 2, 12, seed=0)
    model.load_state_dict({key: value.bfloat16().double() for key, value in model.state_dict().items()})
    exact = converted(model, "cpu")
    choices = choices_of(exact)
    wanted = gradients(exact, "cpu", batch)
    model.bfloat16()
    fused, plain = (
        gradients(repeating(converted(model, card, overrides), choices), card, batch) for overrides in (None, PLAIN)
    )
    worst = [max(distance(got[name], wanted[name]) for name in wanted) for got in (fused, plain)]
    assert worst[0] <= 1.5 * worst[1]
