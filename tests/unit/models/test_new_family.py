"""A family is one record: one that only this file knows is converted, named in files, made small and counted.

Catches what another file knows of a family by its name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lightning_npu_tp import kernels
from lightning_npu_tp.convert.convert import convert
from lightning_npu_tp.estimates.model_sizes import ModelSizes
from lightning_npu_tp.models.families.qwen3_moe import QWEN3_MOE
from lightning_npu_tp.models.file_names import KeyTable, Renamed, all_pieces
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes
from lightning_npu_tp.tools.small_model import shrink
from lightning_npu_tp.tools.testing.models import random_batch, tiny_config

# One dense layer and two others.
LAYERS = {"num_hidden_layers": 3, "mlp_only_layers": [0], "decoder_sparse_step": 1}


class OwnConfig(Qwen3MoeConfig):
    """Has another word for experts too."""

    model_type = "own_moe"
    attribute_map = {"num_specialists": "num_local_experts", **Qwen3MoeConfig.attribute_map}


class OwnForCausalLM(Qwen3MoeForCausalLM):
    """Qwen3-MoE under another name."""

    config_class = OwnConfig


def keys(config: Any) -> KeyTable:
    """Published with another name of the head than Qwen3-MoE's."""
    known = QWEN3_MOE.keys(config)
    return replace(known, entries=[*known.entries, Renamed("*head.weight", "*output.weight")])


OWN = replace(
    QWEN3_MOE,
    name="own_moe",
    model_class="OwnForCausalLM",
    keys=keys,
    experts="num_specialists",
    small={"norm_topk_prob": False},
)


def own_config(**settings: Any) -> OwnConfig:
    """Of 64 experts."""
    values = tiny_config("qwen3_moe", **LAYERS).to_dict()
    return OwnConfig(**{**values, "model_type": "own_moe", "num_local_experts": 64, "norm_topk_prob": True, **settings})


@pytest.fixture
def model() -> Any:
    """The model, converted for one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    meshes, device = Meshes.build(Layout.resolve(world=1), "cpu"), torch.device("cpu")
    with torch.device("meta"):
        model = OwnForCausalLM(own_config())
    (report,) = convert(
        model,
        meshes=meshes,
        groups=Groups(meshes),
        kernels=kernels.select("cpu"),
        families=[OWN],
        device=device,
        dtype=None,
        seed=0,
    )
    assert report.family == "own_moe" and report.swapped["Qwen3MoeSparseMoeBlock"] == 2
    yield model
    dist.destroy_process_group()


def test_it_is_converted_and_trains(model: Any) -> None:
    model(**random_batch(model.config, 2, 6, seed=0)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_files_name_its_tensors(model: Any) -> None:
    pieces = all_pieces(OWN.keys(model.config), ((name, p.shape) for name, p in model.named_parameters()))
    assert [piece.key for piece in pieces["lm_head.weight"]] == ["lm_output.weight"]
    assert len(pieces["model.layers.1.mlp.experts.gate_up_proj"]) == 2 * 64


def test_it_is_made_small() -> None:
    config = own_config(num_hidden_layers=6, mlp_only_layers=[0, 1])
    small = shrink(config, Layout(1, 2, 2), [OWN])
    assert type(small) is OwnConfig and small.norm_topk_prob is False
    assert (small.num_hidden_layers, small.mlp_only_layers) == (3, [0])
    assert small.num_specialists == small.num_experts == 8


def test_its_sizes_are_known() -> None:
    sizes = ModelSizes.of(own_config(), [OWN])
    assert (sizes.experts, sizes.sparse_layers, sizes.head_norms) == (64, 2, True)
    known = tiny_config("qwen3_moe", **LAYERS, num_experts=64)
    assert sizes == ModelSizes.of(known)
