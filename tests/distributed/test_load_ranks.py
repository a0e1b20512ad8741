"""Weights from a Hugging Face folder into shards, against transformers' own loading, bit for bit.

Catches a slice of the wrong rank, an expert in another's place, a part read twice or not at all, a tied head that is
read as a stranger, an error that one rank alone sees, and bytes read that no rank needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_npu_tp import weights_from
from lightning_npu_tp.convert.convert import Options, conversion_of, convert
from lightning_npu_tp.errors import CheckpointError, ConfigError
from lightning_npu_tp.kernels import select
from lightning_npu_tp.models.families.registry import FAMILIES
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes
from lightning_npu_tp.tools.testing.models import tiny_config
from lightning_npu_tp.weights.safetensors_reader import open_folder

LAYOUTS = [(1, 1, 1), (1, 2, 2), (2, 1, 2), (2, 1, 1), (2, 2, 4), (4, 1, 2)]


def saved(folder: Path, family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A folder as transformers saves it, with what it loads from there."""
    config = tiny_config(family)
    for name, value in settings.pop("config", {}).items():
        setattr(config, name, value)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.rand(buffer.shape))
    model.save_pretrained(folder, **settings)
    return model


def sharded(folder: str, sizes: tuple[int, int, int], dtype: torch.dtype | None, how: str = "shard") -> Any:
    data, tensor, expert = sizes
    meshes = Meshes.build(Layout.resolve(world=data * tensor, data=data, tensor=tensor, expert=expert), "cpu")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    weights_from(model, folder)
    convert_on(model, meshes, dtype, how)
    return model


def convert_on(model: Any, meshes: Meshes, dtype: torch.dtype | None, how: str) -> None:
    convert(
        model,
        meshes=meshes,
        groups=Groups(meshes),
        kernels=select("cpu", {}),
        device=torch.device("cpu"),
        dtype=dtype,
        seed=0,
        options=Options(data_parallel=how),  # type: ignore[arg-type]
    )


def gathered(rank: int, world: int, folder: str, cases: list[Any]) -> list[Any]:
    found = []
    for sizes, dtype, how in cases:
        model = sharded(folder, sizes, dtype, how)
        state = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in model.state_dict().items()
        }
        report = conversion_of(model)
        found.append(
            ({name: value.clone() for name, value in state.items()}, report.loaded.bytes, report.loaded.tensors)
        )
    return found


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_layout_holds_what_transformers_loads(on_ranks: Any, tmp_path: Path, family: Any) -> None:
    saved(tmp_path, family.name, max_shard_size="60KB")
    assert len(open_folder(tmp_path).files) > 1
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for world in (1, 2, 4) if family.name == "deepseek_v2" else (2, 4):
        layouts = [sizes for sizes in LAYOUTS if sizes[0] * sizes[1] == world]
        cases = [(sizes, None, "shard") for sizes in layouts]
        if world == 2:
            cases += [((2, 1, 2), None, "replicate"), ((1, 2, 2), torch.bfloat16, "shard")]
        results = on_ranks(gathered, world, str(tmp_path), cases)
        for index, (sizes, dtype, how) in enumerate(cases):
            for rank, result in enumerate(results):
                state, _, tensors = result[index]
                assert list(state) == list(wanted) and tensors == len(open_folder(tmp_path).tensors)
                for name, value in wanted.items():
                    is_bias = name.endswith("e_score_correction_bias")
                    expected = value if dtype is None or is_bias else value.to(dtype)
                    assert torch.equal(state[name], expected), (sizes, how, rank, name)


def test_half_precision_files_fill_a_float32_model(on_ranks: Any, tmp_path: Path) -> None:
    saved(tmp_path, "deepseek_v2", torch.bfloat16)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for state, _, _ in [
        result[0] for result in on_ranks(gathered, 2, str(tmp_path), [((1, 2, 2), torch.float32, "shard")])
    ]:
        assert all(torch.equal(state[name], value) and value.dtype == torch.float32 for name, value in wanted.items())


def test_each_rank_reads_what_it_holds_and_no_more(on_ranks: Any, tmp_path: Path) -> None:
    model = saved(tmp_path, "deepseek_v2")
    for sizes in ((1, 2, 2), (2, 1, 2)):
        results = on_ranks(read_and_held, 2, str(tmp_path), sizes)
        for read, held in results:
            assert read == held
    total = sum(parameter.numel() * 4 for parameter in model.parameters())
    # Over two data ranks with half of the experts each, nothing is read twice.
    assert sum(read for read, _ in results) == total


def read_and_held(rank: int, world: int, folder: str, sizes: tuple[int, int, int]) -> tuple[int, int]:
    model = sharded(folder, sizes, None)
    held = sum(parameter.to_local().numel() * 4 for parameter in model.parameters())
    return conversion_of(model).loaded.bytes, held


def test_files_with_the_models_own_names(on_ranks: Any, tmp_path: Path) -> None:
    model = saved(tmp_path, "deepseek_v2")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    for result in on_ranks(gathered, 2, str(tmp_path), [((1, 2, 2), None, "shard")]):
        state = result[0][0]
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("both", [False, True], ids=["once", "twice"])
def test_a_head_that_shares_the_embedding(on_ranks: Any, tmp_path: Path, both: bool) -> None:
    model = saved(tmp_path, "llama", config={"tie_word_embeddings": True})
    files = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in files
    if both:
        files["lm_head.weight"] = files["model.embed_tokens.weight"].clone()
        save_file(files, tmp_path / "model.safetensors")
    for sizes in ((1, 2, 2), (2, 1, 1)):
        for result in on_ranks(gathered, 2, str(tmp_path), [(sizes, None, "shard")]):
            state = result[0][0]
            assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def refused(rank: int, world: int, folder: str) -> str:
    try:
        sharded(folder, (1, 2, 2), None)
    except CheckpointError as error:
        return str(error)
    return "accepted"


def test_what_does_not_fit_is_named_on_every_rank(on_ranks: Any, tmp_path: Path) -> None:
    saved(tmp_path, "deepseek_v2")
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"

    def messages(tensors: dict[str, torch.Tensor]) -> set[str]:
        save_file(tensors, file)
        return set(on_ranks(refused, 2, str(tmp_path)))

    (text,) = messages({key: value for key, value in good.items() if key != name})
    assert f"1 tensors are missing ({name})" in text
    (text,) = messages(good | {"model.layers.9.stranger": torch.zeros(2)})
    assert "1 have no place in the model (model.layers.9.stranger)" in text
    (text,) = messages(good | {name: torch.zeros(3, 5)})
    assert f"{name} has shape [3, 5], the model wants {list(good[name].shape)}" in text
    (text,) = messages({key.removeprefix("model."): value for key, value in good.items() if key != "lm_head.weight"})
    assert "the decoder alone, without its head" in text
    (text,) = messages({key: value for key, value in good.items() if key != "lm_head.weight"})
    assert "set tie_word_embeddings to true" in text
    for prefix in ("module.", "_orig_mod.", "model.", "base_model.model."):
        (text,) = messages({prefix + key: value for key, value in good.items()})
        assert f"The names begin with {prefix!r}, which what wrapped the model" in text
    adapted = "base_model.model.lm_head.lora_A.default.weight"
    (text,) = messages({f"base_model.model.{key}": value for key, value in good.items()} | {adapted: torch.zeros(2, 4)})
    assert "It holds a LoRA adapter that is not merged with its model" in text and "merge_and_unload()" in text
    (text,) = messages(good | {name: torch.zeros(good[name].shape, dtype=torch.int8)})
    assert f"{name} in {file} holds whole numbers (int8) where the deepseek_v2 model has real ones" in text
    save_file(good | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}, file)
    assert set(on_ranks(refused, 2, str(tmp_path))) == {"accepted"}


def broken_on_one(rank: int, world: int, folder: str) -> str:
    # The config is everybody's; the weights lie on the disk of one host only.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    weights_from(model, folder if rank == 0 else f"{folder}/not/here")
    meshes = Meshes.build(Layout.resolve(world=2, data=1, tensor=2), "cpu")
    try:
        convert_on(model, meshes, None, "shard")
    except CheckpointError as error:
        return str(error)
    return "accepted"


def test_an_error_of_one_rank_is_everybodys(on_ranks: Any, tmp_path: Path) -> None:
    saved(tmp_path, "deepseek_v2")
    (text,) = set(on_ranks(broken_on_one, 2, str(tmp_path)))
    assert f"The model folder {tmp_path}/not/here does not exist" in text


def test_a_model_with_weights_is_not_marked() -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM has some already"):
        weights_from(AutoModelForCausalLM.from_config(tiny_config("llama")), "folder")
