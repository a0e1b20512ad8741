"""transformers' own methods on a converted model: write it, resize its vocabulary, switch recompute on.

Catches a file with shards or with names of ours in it, a call of one rank that waits for the others for hours, and a
switch that runs transformers' recompute, which counts picks twice and cuts slices wrongly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.errors import ConfigError, ConversionError
from lightning_npu_tp.models.layers.whole_weights import require_all_ranks
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.tools.testing import sharded
from lightning_npu_tp.tools.testing.models import random_batch, reference_model, tiny_config
from lightning_npu_tp.tools.testing.reference import float64_reference, relative_difference
from lightning_npu_tp.tools.testing.sharded import gradient, moe_blocks, sharded_model, whole

LAYOUTS = {"tensor": (1, 2, 2), "shard": (2, 1, 2), "both": (2, 2, 4)}
REPLICATE = Options(data_parallel="replicate")


def save(rank: int, world_size: int, family: str, sizes: tuple[int, int, int], folder: str, options: Options) -> None:
    config = tiny_config(family, tie_word_embeddings=family == "llama", vocab_size=131)
    model, _ = sharded_model(config, Layout(*sizes), options)
    model.save_pretrained(folder, max_shard_size="60KB")


@pytest.mark.parametrize(
    ("family", "layout", "options"),
    [
        ("deepseek_v2", "tensor", Options()),
        ("deepseek_v3", "both", Options()),
        ("mixtral", "shard", Options()),
        ("llama", "shard", Options()),
        ("qwen2_moe", "tensor", Options()),
        ("qwen3_moe", "shard", REPLICATE),
        ("olmoe", "tensor", Options()),
        ("qwen2", "shard", REPLICATE),
        ("qwen3", "tensor", Options()),
    ],
)
def test_what_save_pretrained_writes_is_what_transformers_loads(
    on_ranks: Any, tmp_path: Path, family: str, layout: str, options: Options
) -> None:
    sizes = LAYOUTS[layout]
    on_ranks(save, Layout(*sizes).world, family, sizes, str(tmp_path), options, timeout=120)
    text = (tmp_path / "config.json").read_text()
    wanted = reference_model(tiny_config(family, tie_word_embeddings=family == "llama", vocab_size=131))
    assert json.loads(text)["architectures"] == [type(wanted).__name__] and "lightning" not in text
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for (name, value), (its_name, its_value) in zip(
        loaded.state_dict().items(), wanted.state_dict().items(), strict=True
    ):
        assert name == its_name and torch.equal(value, its_value.to(value.dtype)), name


def one_rank_only(rank: int, world_size: int) -> None:
    if rank == 0:
        with pytest.raises(ConfigError, match=r"save_pretrained\(\) was called by 1 of the 2 ranks.*is_global_zero"):
            require_all_ranks("save_pretrained", seconds=0.3)


def test_a_call_that_one_rank_makes_alone_is_told(on_ranks: Any) -> None:
    on_ranks(one_rank_only, 2)


def resize(rank: int, world_size: int, tied: bool) -> dict[str, float]:
    config = tiny_config("qwen2", tie_word_embeddings=tied)
    model, _ = sharded_model(config, Layout(1, 2, 2))
    with float64_reference():
        reference = reference_model(config)
        reference.resize_token_embeddings(131, mean_resizing=False)
        embedding = model.resize_token_embeddings(131, mean_resizing=False)
    assert embedding is model.get_input_embeddings() is model.resize_token_embeddings()
    assert (model.lm_head.weight is embedding.weight) == tied and model.config.vocab_size == 131
    state = {name: whole(value) for name, value in model.state_dict().items()}
    for name, value in reference.state_dict().items():
        assert torch.equal(state[name][:128], value[:128]), name
    reference.load_state_dict(state)
    batch = random_batch(model.config, 2, 9, seed=3)
    batch["input_ids"][0, 0] = batch["labels"][0, 3] = 130
    with float64_reference():
        wanted = reference(**batch)
        wanted.loss.backward()
    actual = model(**batch, gather_logits=True)
    actual.loss.backward()
    found = {"loss": relative_difference(actual.loss, wanted.loss)}
    found["logits"] = relative_difference(actual.logits, wanted.logits)
    gradients = {name: whole(gradient(p)) for name, p in model.named_parameters()}
    return found | {n: relative_difference(gradients[n], gradient(p)) for n, p in reference.named_parameters()}


def cannot_resize(rank: int, world_size: int) -> None:
    model, _ = sharded_model(tiny_config("qwen2"), Layout(2, 1, 1))
    with pytest.raises(ConversionError, match=r"resize_token_embeddings\(131\) after conversion.*configure_model"):
        model.resize_token_embeddings(131)


def test_the_vocabulary_can_be_resized_over_tensor_ranks_and_not_over_data_ranks(on_ranks: Any) -> None:
    for tied in (False, True):
        for found in on_ranks(resize, 2, tied):
            assert max(found.values()) < 1e-10, found
    on_ranks(cannot_resize, 2)


def switched(rank: int, world_size: int, when: str, family: str, sizes: tuple[int, int, int]) -> dict[str, Any]:
    """Loss, gradients and counts of a step with recompute, switched on in one of three ways."""
    config = tiny_config(family, aux_loss_alpha=0.1)
    options = Options(sequence_parallel=sizes[1] > 1, recompute="block" if when == "option" else "none")
    if when == "before":
        build = sharded.reference_model
        sharded.reference_model = lambda *a, **k: switch_on(build(*a, **k))
    try:
        model, _ = sharded_model(config, Layout(*sizes), options)
    finally:
        if when == "before":
            sharded.reference_model = build
    if when == "after":
        switch_on(model)
    runs = []
    model.model.layers[-1].input_layernorm.register_forward_hook(lambda *_: runs.append(1))
    output = model(**random_batch(config, 2, 9, seed=0))
    (output.loss + output.aux_loss).backward()
    return {
        "runs": len(runs),
        "tensors": [output.loss.detach(), *(whole(gradient(p)).clone() for p in model.parameters())],
        "counts": [block.pending_tokens_per_expert for block in moe_blocks(model)],
    }


def switch_on(model: Any) -> Any:
    # transformers 5.23 renames the switch; 5.17 has the other name only.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    return model.train()


@pytest.mark.parametrize(("family", "layout"), [("deepseek_v2", "tensor"), ("qwen2_moe", "shard")])
def test_transformers_switch_means_recompute_of_whole_layers(on_ranks: Any, family: str, layout: str) -> None:
    sizes = LAYOUTS[layout]
    results = {
        when: on_ranks(switched, Layout(*sizes).world, when, family, sizes) for when in ("option", "before", "after")
    }
    for rank, wanted in enumerate(results["option"]):
        assert wanted["runs"] == 2
        for when in ("before", "after"):
            found = results[when][rank]
            assert found["runs"] == 2, when
            for kind in ("tensors", "counts"):
                assert all(torch.equal(a, b) for a, b in zip(found[kind], wanted[kind], strict=True)), (when, kind)


def nothing_shared(rank: int, world_size: int, sizes: tuple[int, int, int]) -> dict[str, float]:
    config = tiny_config("deepseek_v2", n_shared_experts=0)
    with float64_reference():
        reference = reference_model(config)
    model, _ = sharded_model(config, Layout(*sizes))
    batch = random_batch(config, 2, 9, seed=0)
    with float64_reference():
        wanted = reference(**batch)
        wanted.loss.backward()
    actual = model(**batch)
    actual.loss.backward()
    found = {name: whole(gradient(p)) for name, p in model.named_parameters()}
    differences = {n: relative_difference(found[n], gradient(p)) for n, p in reference.named_parameters()}
    return differences | {"loss": relative_difference(actual.loss, wanted.loss)}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("layout", ["tensor", "shard"])
def test_no_shared_experts_are_as_in_transformers(on_ranks: Any, layout: str) -> None:
    sizes = LAYOUTS[layout]
    for found in on_ranks(nothing_shared, Layout(*sizes).world, sizes):
        assert max(found.values()) < 1e-10, found
