"""Whole models with fused kernels on the simulated card against the same models on the CPU in float64.

Catches a layer that does not use the kernels it was given, or uses them in a way that only shows in their
company: packed documents, padding, mixed precision, recompute, generation; and a kernel that cannot be switched off.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fused import ALL, FLOAT32, OPERATORS, Seen, distance
from torch import Tensor

from lightning_npu_tp.convert.convert import Options, convert
from lightning_npu_tp.kernels import select
from lightning_npu_tp.models.moe.router import TopKRouter
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes
from lightning_npu_tp.tools.testing.models import (
    random_batch,
    reference_model,
    tiny_config,
    tiny_deepseek_v2_grouped_config,
)
from lightning_npu_tp.tools.testing.operators import CountOperators

# torch_npu's own deepcopy of a tensor asks torch for what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.npu.set_device(0)
    dist.init_process_group("cpu:gloo,npu:hccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


MODELS = {
    "deepseek_v2": lambda: tiny_config("deepseek_v2"),
    "deepseek_v2 grouped": tiny_deepseek_v2_grouped_config,
    "qwen3_moe": lambda: tiny_config("qwen3_moe"),
    "llama": lambda: tiny_config("llama"),
}


def converted(model: Any, device: str, overrides: dict[str, str] | None = None, **options: Any) -> Any:
    model, meshes = copy.deepcopy(model), Meshes.build(Layout(1, 1, 1), device)
    convert(
        model,
        meshes=meshes,
        groups=Groups(meshes),
        kernels=select(device, overrides),
        device=torch.device(device),
        dtype=None,
        seed=0,
        options=Options(**options),
    )
    return model.train()


def train(model: Any, device: str, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
    loss.backward()
    grads = {name: p.grad.to_local() for name, p in model.named_parameters() if p.grad is not None}
    return loss, grads


def batches(config: Any) -> dict[str, dict[str, Tensor]]:
    whole = random_batch(config, 2, 12, seed=0)
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None].expand(2, -1)
    return {
        "whole": whole,
        "padded": random_batch(config, 2, 12, seed=0, padding=True),
        "packed": {**whole, "position_ids": positions},
    }


@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_of_a_model_with_all_fused_kernels_equal_the_cpus(one_rank, name, kind):
    config = MODELS[name]()
    model, batch = reference_model(config), batches(config)[kind]
    wanted_loss, wanted = train(converted(model, "cpu"), "cpu", batch)
    with Seen() as seen:
        loss, got = train(converted(model.float(), "npu"), "npu", batch)
    has_experts = name != "llama"
    assert {"npu_rms_norm", "npu_rotary_mul", "npu_fusion_attention"} <= seen.names
    assert {"npu_grouped_matmul", "npu_moe_token_permute", "npu_swiglu"} <= seen.names or not has_experts
    assert distance(loss, wanted_loss) <= FLOAT32
    assert got.keys() == wanted.keys()
    for parameter, gradient in got.items():
        assert distance(gradient, wanted[parameter]) <= FLOAT32, parameter


def test_every_norm_rotation_and_attention_of_a_model_is_fused(one_rank):
    for name, norms_per_layer in (("deepseek_v2", 3), ("deepseek_v2 grouped", 4), ("qwen3_moe", 4), ("llama", 2)):
        config = MODELS[name]()
        model, batch = converted(reference_model(config).float(), "npu"), batches(config)["whole"]
        with Seen() as seen, torch.no_grad():
            model(**{key: value.npu() for key, value in batch.items()})
        layers = config.num_hidden_layers
        counted = {operator: seen.calls[operator] for operator in ("npu_rms_norm", "npu_rotary_mul")}
        assert counted == {"npu_rms_norm": norms_per_layer * layers + 1, "npu_rotary_mul": 2 * layers}, name
        assert seen.calls["npu_fusion_attention"] == layers, name


def worst(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return max(distance(gradient, wanted[name]) for name, gradient in got.items())


def routers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, TopKRouter)]


def choices_of(model: Any) -> list[Tensor]:
    """Filled by the next forward: the experts of each token, layer by layer."""
    found: list[Tensor] = []
    for router in routers(model):
        router.register_forward_hook(lambda module, args, routing: found.append(routing.experts_TK))
    return found


def repeating(model: Any, choices: list[Tensor]) -> Any:
    """Rounding decides near-ties one way or the other, and then it is another function whose gradient is compared."""
    for router, experts_TK in zip(routers(model), choices, strict=True):
        router.register_forward_pre_hook(
            lambda module, args, kwargs, experts_TK=experts_TK: (args, {**kwargs, "experts_TK": experts_TK.npu()}),
            with_kwargs=True,
        )
    return model


PLAIN = dict.fromkeys(OPERATORS, "reference")


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["deepseek_v2", "qwen3_moe"])
def test_in_bfloat16_fused_kernels_are_as_near_to_float64_as_the_references(one_rank, name, seed):
    config = MODELS[name]()
    model, batch = reference_model(config, seed=seed), batches(config)["packed"]
    model.load_state_dict({key: value.bfloat16().double() for key, value in model.state_dict().items()})
    exact = converted(model, "cpu")
    choices = choices_of(exact)
    _, wanted = train(exact, "cpu", batch)
    model.bfloat16()
    _, fused = train(repeating(converted(model, "npu"), choices), "npu", batch)
    _, reference = train(repeating(converted(model, "npu", PLAIN), choices), "npu", batch)
    assert worst(fused, wanted) <= 1.5 * worst(reference, wanted)


@pytest.mark.parametrize("name", ["deepseek_v2", "qwen3_moe"])
def test_a_step_in_mixed_precision_uses_the_fused_kernels_and_keeps_float32_gradients(one_rank, name):
    """Qwen's normed queries come in float32 there and its values in bfloat16."""
    config = MODELS[name]()
    model, batch = reference_model(config).float(), batches(config)["padded"]
    exact = converted(model, "cpu")
    choices = choices_of(exact)
    _, wanted = train(exact, "cpu", batch)
    with Seen() as seen, torch.autocast("npu", dtype=torch.bfloat16):
        _, got = train(repeating(converted(model, "npu"), choices), "npu", batch)
    with torch.autocast("npu", dtype=torch.bfloat16):
        _, reference = train(repeating(converted(model, "npu", PLAIN), choices), "npu", batch)
    assert seen.names >= ALL
    assert all(gradient.dtype == torch.float32 for gradient in got.values())
    assert worst(got, wanted) <= 1.5 * worst(reference, wanted)


@pytest.mark.parametrize("recompute", ["moe", "block"])
def test_recomputed_layers_give_the_same_gradients(one_rank, recompute):
    config = MODELS["deepseek_v2"]()
    model, batch = reference_model(config).float(), batches(config)["whole"]
    _, wanted = train(converted(model, "npu"), "npu", batch)
    _, got = train(converted(model, "npu", recompute=recompute), "npu", batch)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_rows_that_travel_are_sorted_by_the_operator_as_well(one_rank):
    config = MODELS["deepseek_v2"]()
    model, batch = reference_model(config), batches(config)["padded"]
    _, wanted = train(converted(model, "cpu"), "cpu", batch)
    with Seen() as seen:
        _, got = train(converted(model.float(), "npu", dispatch="all_to_all"), "npu", batch)
    # Once to send and once where they arrive, in each of two layers.
    assert seen.calls["npu_moe_token_permute"] == seen.calls["_npu_moe_token_unpermute"] == 4
    assert worst(got, wanted) <= FLOAT32


@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
def test_a_step_with_all_fused_kernels_asks_the_host_nothing_and_has_no_dynamic_shape(one_rank, kind):
    config = MODELS["deepseek_v2 grouped"]()
    model, batch = converted(reference_model(config).float(), "npu"), batches(config)[kind]
    train(model, "npu", batch)
    placed = {name: value.npu() for name, value in batch.items()}
    with CountOperators() as counter:
        model(**placed).loss.backward()
    assert not counter.found(), [str(sighting) for sighting in counter.found()]


@pytest.mark.parametrize("operation", OPERATORS)
def test_each_kernel_can_be_switched_off_to_find_a_fault(one_rank, operation):
    config = MODELS["deepseek_v2"]()
    model, batch = reference_model(config), batches(config)["whole"]
    _, wanted = train(converted(model, "cpu"), "cpu", batch)
    with Seen() as seen:
        _, got = train(converted(model.float(), "npu", {operation: "reference"}), "npu", batch)
    assert seen.names & ALL == ALL - OPERATORS[operation]
    assert worst(got, wanted) <= FLOAT32


def test_tokens_are_generated_from_a_cache_as_on_the_cpu(one_rank):
    model = reference_model(MODELS["deepseek_v2"]()).float()
    prompt = torch.arange(2, 9)[None]
    settings = {"max_new_tokens": 5, "do_sample": False, "use_cache": True}
    texts = [
        converted(model, device).eval().generate(prompt.to(device), **settings).cpu().tolist()
        for device in ("cpu", "npu")
    ]
    assert texts[0] == texts[1]
