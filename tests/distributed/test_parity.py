"""Any number of ranks computes what transformers computes in one process, in float64.

Catches a missing or doubled collective (a gradient off by the number of ranks, or partial), a shard
filled from the wrong slice, a loss normalised by the wrong count: loss, logits, every parameter's
gradient, the clip norm and the parameters after three AdamW steps are compared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import DeepseekV2Config

from lightning_npu_tp import kernels
from lightning_npu_tp.clipping import clip_grad_norm_, total_grad_norm
from lightning_npu_tp.convert import convert
from lightning_npu_tp.layers.vocab import IGNORED_LABEL
from lightning_npu_tp.layout import Groups, Layout, Meshes
from lightning_npu_tp.testing.models import (
    random_batch,
    reference_model,
    reference_step,
    tiny_deepseek_v2_config,
    tiny_deepseek_v2_grouped_config,
)
from lightning_npu_tp.testing.reference import relative_difference

# Double rounding over a few thousand additions per element; a real mistake is 1e-3 and more.
TOLERANCE = 1e-10
STEPS, LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 3, 1e-2, 0.1, 0.05

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


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_step(rank: int, world_size: int, case: dict[str, Any]) -> dict[str, Any]:
    config = _config(case)
    # Other weights on the other ranks: rank 0's must reach them.
    model = reference_model(config, seed=0 if rank == 0 else 99)
    meshes, groups = Meshes.build(Layout.resolve(world=world_size), "cpu"), Groups()
    groups.bind(meshes)
    convert(
        model,
        meshes=meshes,
        groups=groups,
        kernels=kernels.select("cpu"),
        device=torch.device("cpu"),
        dtype=None,
        seed=0,
    )
    batches = _batches(case, config)
    tokens = sum(int((batch["labels"][:, 1:] != IGNORED_LABEL).sum()) for batch in batches)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    result: dict[str, Any] = {"losses": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            output = model(**batch, num_items_in_batch=tokens, gather_logits=True)
            output.loss.backward()
            loss += output.loss.detach()
            if step == 0:
                result.setdefault("logits", []).append(output.logits.detach())
        result["losses"].append(loss)
        if step == 0:
            result["gradients"] = {name: _full(p.grad).clone() for name, p in parameters.items()}
            result["grad_norm"] = total_grad_norm(list(parameters.values()))
        clip_grad_norm_(list(parameters.values()), CLIP_NORM)
        optimizer.step()
    result["parameters"] = {name: _full(p.detach()) for name, p in parameters.items()}
    dist.barrier()
    return result


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_sharded_training_run_equals_transformers_in_one_process(on_ranks: Any, name: str, world_size: int) -> None:
    case = CASES[name]
    config = _config(case)
    batches = _batches(case, config)
    expected = reference_step(
        reference_model(config),
        batches,
        steps=STEPS,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        clip_norm=CLIP_NORM,
    )
    assert expected.grad_norm > CLIP_NORM, "the case must clip"
    differences: dict[str, float] = {}
    for rank, result in enumerate(on_ranks(sharded_step, world_size, case, timeout=120)):
        assert result["gradients"].keys() == expected.gradients.keys()
        for step, (actual, wanted) in enumerate(zip(result["losses"], expected.losses, strict=True)):
            differences[f"rank {rank} loss of step {step}"] = relative_difference(actual, wanted)
        for index, (actual, wanted, batch) in enumerate(zip(result["logits"], expected.logits, batches, strict=True)):
            seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            differences[f"rank {rank} logits {index}"] = relative_difference(actual[seen], wanted[seen])
        differences[f"rank {rank} clip norm"] = relative_difference(result["grad_norm"], expected.grad_norm)
        for parameter, wanted in expected.gradients.items():
            key = f"rank {rank} gradient of {parameter}"
            differences[key] = relative_difference(result["gradients"][parameter], wanted)
        for parameter, wanted in expected.parameters.items():
            key = f"rank {rank} {parameter} after {STEPS} steps"
            differences[key] = relative_difference(result["parameters"][parameter], wanted)
    worst = max(differences, key=differences.__getitem__)
    print(f"{name} on {world_size} ranks: worst relative difference {differences[worst]:.2e} ({worst})")
    assert differences[worst] <= TOLERANCE, f"{worst}: {differences[worst]:.3e}"
