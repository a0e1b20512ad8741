"""The model's forward and backward pass asks the host nothing and has no shape that depends on data.

Catches an `.item()`, a boolean index, a `nonzero` or a mask decided by looking at it: each stalls an accelerator's
queue, and some have no Ascend kernel. Counted with the kernels of cuda and npu (the CPU's own read counts).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV2ForCausalLM

from lightning_npu_tp import kernels
from lightning_npu_tp.convert.convert import Options, convert
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes
from lightning_npu_tp.tools.testing.models import random_batch, tiny_deepseek_v2_config, tiny_deepseek_v2_grouped_config
from lightning_npu_tp.tools.testing.operators import CountOperators


def batches(config: Any) -> list[dict[str, torch.Tensor]]:
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)
    return [
        random_batch(config, 2, 12, seed=0),
        random_batch(config, 2, 12, seed=0, padding=True),
        {**random_batch(config, 2, 12, seed=0), "position_ids": positions},
    ]


def count(rank: int, world_size: int, device_type: str, grouped: bool) -> list[str]:
    make = tiny_deepseek_v2_grouped_config if grouped else tiny_deepseek_v2_config
    config = make(aux_loss_alpha=0.001, use_cache=True)
    model = DeepseekV2ForCausalLM(config).to(torch.bfloat16)
    meshes, groups = Meshes.build(Layout.resolve(world=world_size), "cpu"), Groups()
    groups.bind(meshes)
    convert(
        model,
        meshes=meshes,
        groups=groups,
        kernels=kernels.select(device_type),
        device=torch.device("cpu"),
        dtype=None,
        seed=0,
    )
    model.train()
    found = []
    for batch in batches(config):
        with CountOperators() as counter:
            output = model(**batch)
            (output.loss + output.aux_loss).backward()
        found += [str(sighting) for sighting in counter.found()]
    return found


@pytest.mark.parametrize("device_type", ["cuda", "npu"])
@pytest.mark.parametrize("grouped", [False, True], ids=["greedy", "groups"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_training_step_has_no_host_sync_and_no_dynamic_shape(
    on_ranks: Any, world_size: int, device_type: str, grouped: bool
) -> None:
    for rank, found in enumerate(on_ranks(count, world_size, device_type, grouped)):
        assert not found, f"rank {rank}: {found}"


def count_per_direction(
    rank: int, world_size: int, device_type: str, layout: Layout, options: Options
) -> tuple[list[str], list[str]]:
    """What a step of an all-to-all layout asks the host, forward and backward."""
    config = tiny_deepseek_v2_config(aux_loss_alpha=0.001)
    model = DeepseekV2ForCausalLM(config).to(torch.bfloat16)
    meshes = Meshes.build(layout, "cpu")
    convert(
        model,
        meshes=meshes,
        groups=Groups(meshes),
        kernels=kernels.select(device_type),
        device=torch.device("cpu"),
        dtype=None,
        seed=0,
        options=options,
    )
    model.train()
    batch = random_batch(config, 2, 12, seed=rank)
    with CountOperators() as forward:
        output = model(**batch)
    with CountOperators() as backward:
        (output.loss + output.aux_loss).backward()
    return [str(s) for s in forward.found()], [str(s) for s in backward.found()]


@pytest.mark.parametrize("device_type", ["cuda", "npu"])
@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "slices"])
@pytest.mark.parametrize("recompute", ["none", "moe", "block"])
def test_all_to_all_asks_the_host_once_per_layer_and_never_backward(
    on_ranks: Any, recompute: Any, sliced: bool, device_type: str
) -> None:
    options = Options(recompute=recompute, sequence_parallel=sliced)
    for layout in (Layout(2, 1, 2), *([Layout(2, 2, 4)] if recompute == "block" else [])):
        for forward, backward in on_ranks(count_per_direction, layout.world, device_type, layout, options):
            assert len(forward) == 2, f"one for each of the two mixture layers: {forward}"
            assert all("_exchange_counts" in sighting for sighting in forward), forward
            assert not backward, backward


def test_the_counter_sees_what_transformers_does() -> None:
    config = tiny_deepseek_v2_config()
    config._experts_implementation = "eager"
    model, batch = DeepseekV2ForCausalLM(config), random_batch(config, 2, 12, seed=0)
    with CountOperators() as counter:
        model(**batch).loss.backward()
    operators = {sighting.operator for sighting in counter.found()}
    assert any("nonzero" in operator for operator in operators), operators
