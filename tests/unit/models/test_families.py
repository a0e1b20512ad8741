"""What each family's record says, on one process. Catches a class that is swapped too seldom, a variant with other
numbers that is accepted, a layout refused without the sizes that work, generation that attends wrongly with a
cache, and a page that lists other families than the registry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from lightning_npu_tp import kernels
from lightning_npu_tp.convert.convert import check_sizes, conversion_of, convert, materialize_rest
from lightning_npu_tp.errors import ConfigError, ConversionError
from lightning_npu_tp.models.families.registry import FAMILIES, families_table, family_named, supported
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes
from lightning_npu_tp.parallel.plan import match_plan
from lightning_npu_tp.tools.testing.models import random_batch, tiny_config

NAMES = [family.name for family in FAMILIES]
PAGE = Path(__file__).parents[3] / "docs" / "own-models.md"


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    meshes, groups = Meshes.build(Layout.resolve(world=1), "cpu"), Groups()
    groups.bind(meshes)
    settings = {"kernels": kernels.select("cpu"), "device": torch.device("cpu"), "dtype": None, "seed": 0}
    yield {"meshes": meshes, "groups": groups, **settings}
    dist.destroy_process_group()


def _model(name: str, device: str = "cpu", **overrides: Any) -> Any:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(tiny_config(name, **overrides))


COUNTS = {
    "deepseek_v2": {"DeepseekV2Attention": 3, "DeepseekV2RMSNorm": 7, "DeepseekV2MLP": 1, "DeepseekV2Moe": 2},
    "deepseek_v3": {"DeepseekV3Attention": 2, "DeepseekV3RMSNorm": 5, "DeepseekV3MLP": 1, "DeepseekV3MoE": 1},
    "qwen2_moe": {"Qwen2MoeAttention": 3, "Qwen2MoeRMSNorm": 7, "Qwen2MoeMLP": 1, "Qwen2MoeSparseMoeBlock": 2},
    "qwen3_moe": {"Qwen3MoeAttention": 2, "Qwen3MoeRMSNorm": 5, "Qwen3MoeMLP": 1, "Qwen3MoeSparseMoeBlock": 1},
    "mixtral": {"MixtralAttention": 2, "MixtralRMSNorm": 5, "MixtralSparseMoeBlock": 2},
    "olmoe": {"OlmoeAttention": 2, "OlmoeRMSNorm": 5, "OlmoeSparseMoeBlock": 2},
    "llama": {"LlamaAttention": 2, "LlamaRMSNorm": 5, "LlamaMLP": 2},
    "qwen2": {"Qwen2Attention": 2, "Qwen2RMSNorm": 5, "Qwen2MLP": 2},
    "qwen3": {"Qwen3Attention": 2, "Qwen3RMSNorm": 5, "Qwen3MLP": 2},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_module_that_needs_it_is_swapped_and_names_and_their_order_stay(alone: dict, name: str) -> None:
    model = _model(name)
    state = [(key, value.shape) for key, value in model.state_dict().items()]
    parameters = [key for key, _ in model.named_parameters()]
    rotary = type(model.model.rotary_emb).__name__
    report = convert(model, **alone)[0]
    assert report.family == name
    assert report.swapped == {"Embedding": 1, "Linear": 1, rotary: 1, **COUNTS[name]}
    assert [(key, value.shape) for key, value in model.state_dict().items()] == state
    # An optimizer that loads a checkpoint of one file goes by the order.
    assert [key for key, _ in model.named_parameters()] == parameters
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_model_on_meta_becomes_whole_and_trains(alone: dict, name: str) -> None:
    model = _model(name, device="meta")
    convert(model, **alone)
    materialize_rest(model, device=torch.device("cpu"), seed=0)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    for key, value in model.state_dict().items():
        if key.endswith("norm.weight"):
            assert value.full_tensor().eq(1).all(), key
        elif key.endswith("bias"):
            assert not value.any(), key
    loss = model(**random_batch(model.config, 2, 6, seed=0)).loss
    loss.backward()
    assert loss.isfinite() and all(parameter.grad is not None for parameter in model.parameters())


def test_layers_that_are_all_dense_or_all_sparse_match_their_plans(alone: dict) -> None:
    dense = convert(_model("qwen3_moe", mlp_only_layers=[0, 1]), **alone)[0]
    assert dense.swapped["Qwen3MoeMLP"] == 2 and dense.dispatch == "none"
    sparse = convert(_model("qwen2_moe", mlp_only_layers=[], decoder_sparse_step=1), **alone)[0]
    assert sparse.swapped["Qwen2MoeSparseMoeBlock"] == 3 and "Qwen2MoeMLP" not in sparse.swapped
    third = convert(_model("qwen2_moe", mlp_only_layers=[], decoder_sparse_step=3), **alone)[0]
    assert third.swapped["Qwen2MoeSparseMoeBlock"] == 1 and third.swapped["Qwen2MoeMLP"] == 2
    v3 = convert(_model("deepseek_v3", first_k_dense_replace=0), **alone)[0]
    assert v3.swapped["DeepseekV3MoE"] == 2


def test_the_selection_bias_of_deepseek_v3_keeps_its_name_and_values(alone: dict) -> None:
    model = _model("deepseek_v3")
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias.uniform_()
    before = gate.e_score_correction_bias.clone()
    convert(model, **alone)
    assert torch.equal(model.state_dict()["model.layers.1.mlp.gate.e_score_correction_bias"], before)


REFUSED = [
    ("mixtral", {"sliding_window": 8}, "sliding_window=8.*mixtral.*sliding_window to null"),
    ("llama", {"is_causal": False}, "is_causal=False"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "use_sliding_window to false"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding_window=8.*qwen3"),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window=8.*qwen2_moe"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window=8.*qwen3_moe"),
    ("deepseek_v3", {"num_key_value_heads": 4}, "num_key_value_heads=4"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='dynamic'"),
]


@pytest.mark.parametrize(("name", "overrides", "message"), REFUSED, ids=[f"{n}-{next(iter(o))}" for n, o, _ in REFUSED])
def test_variants_that_would_give_other_numbers_are_refused(
    alone: dict, name: str, overrides: dict, message: str
) -> None:
    model = _model(name, **overrides)
    modules = list(model.modules())
    with pytest.raises(ConversionError, match=message):
        convert(model, **alone)
    assert conversion_of(model) is None and list(model.modules()) == modules


def test_a_window_on_no_layer_is_no_window(alone: dict) -> None:
    model = _model("qwen2", use_sliding_window=False, sliding_window=8, max_window_layers=0)
    assert convert(model, **alone)[0].family == "qwen2"


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("deepseek")])
def test_key_heads_that_the_tensor_ranks_do_not_divide_are_refused_with_sizes_that_work(name: str) -> None:
    family, model = family_named(name), _model(name, device="meta", num_key_value_heads=2)
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    rules = match_plan(family.plan(model.config), shapes, family=name)
    with pytest.raises(ConfigError) as refused:
        check_sizes(family, model.config, rules, shapes, Layout(data=1, tensor=4, expert=4))
    text = str(refused.value)
    assert f"tensor_parallel_size=4 cannot split the 2 key heads of {name}" in text and "one of [1, 2]" in text


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmoe", "qwen2_moe", "deepseek_v3"])
def test_generation_with_a_cache_gives_the_tokens_of_transformers(alone: dict, name: str) -> None:
    torch.manual_seed(0)
    model = _model(name).eval()
    batch = random_batch(model.config, 2, 7, seed=0)
    ask = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :3] = 0
    wanted = model.generate(batch["input_ids"], attention_mask=mask, **ask)
    convert(model, **alone)
    assert torch.equal(model.generate(batch["input_ids"], attention_mask=mask, **ask), wanted)


def test_balance_losses_are_off_unless_the_config_asks_for_them(alone: dict) -> None:
    model = _model("mixtral", router_aux_loss_coef=0.1).train()
    batch = random_batch(model.config, 2, 6, seed=0)
    convert(model, **alone)
    assert model(**batch).aux_loss is None
    model = _model("mixtral", aux_loss_alpha=0.1).train()
    convert(model, **alone)
    assert model(**batch).aux_loss > 0


def test_the_page_holds_the_registrys_table() -> None:
    assert families_table() in PAGE.read_text()
    assert len(families_table().splitlines()) == len(FAMILIES) + 2
    assert supported() == NAMES == list(COUNTS)
    printed = subprocess.run(
        [sys.executable, "-m", "lightning_npu_tp.models.families"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert printed.stdout.strip() == families_table()
