"""What `check` finds before it starts a process, and how it says so.

Catches a mistake of the user's that is told by a traceback or after minutes, a tokenizer that does not fit its model
and passes, parameters counted twice, a model too large for the host that is tried all the same, and torch_npu imported
by a run that asked for no NPU.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Tokens
from tokenizers import models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.errors import ConfigError, DeviceError
from lightning_npu_tp.estimates.what_fits import kept_for_the_run
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.tools import check_folder, host_memory
from lightning_npu_tp.tools.cli import app
from lightning_npu_tp.tools.testing import ranks
from lightning_npu_tp.tools.testing.models import tiny_config

SMALL = {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(tiny_config("deepseek_v2", **SMALL)).save_pretrained(place)
    return place


def check(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tensor", 3], "--tensor 3 cannot split the 8 heads of deepseek_v2. Set --tensor to one of [1, 2, 4, 8]"),
        (["--tensor", 0], "--tensor 0 is no number"),
        (["--tensor", 2, "--expert", 3], "--expert 3 must be a multiple of --tensor 2"),
        (["--data", 2, "--batch", 1], "--batch 1 leaves some of --data 2 ranks without a sequence"),
        (["--length", 1], "--length 1 leaves nothing to predict"),
        (["--length", 5000], "--length 5000 is beyond the model's 1280 positions"),
        (["--dtype", "float16"], "--dtype float16 cannot be computed on cpu. Use one of float32, bfloat16, float64"),
        (["--dispatch", "fast"], "dispatch='fast' does not exist. Set --dispatch to one of"),
        (["--recompute", "all"], "recompute='all' does not exist. Set --recompute to one of"),
        (["--device", "tpu"], "'tpu' is not supported"),
        (["--json", "/no/such/folder/x.json"], "lies in a folder that does not exist"),
    ],
)
def test_a_setting_that_cannot_work_is_told_in_one_line_before_any_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[Any], told: str
) -> None:
    monkeypatch.setattr(ranks, "run_ranks", lambda *_, **__: pytest.fail("a process was started"))
    result = check("--model", folder, "--device", "cpu", *arguments)
    assert result.exit_code == 2 and told in result.output, result.output
    assert len(result.output.strip().splitlines()) == 1


def test_folders_that_are_none(folder: Path, tmp_path: Path) -> None:
    for given, told in {tmp_path / "absent": "does not exist", folder / "config.json": "is a file"}.items():
        result = check("--model", given)
        assert result.exit_code == 2 and f"{given} {told}" in result.output
    file = tmp_path / "config.json"
    for text, told in {
        "{": "is no model config",
        '{"model_type": "bert"}': "'bert' is not supported",
        '{"model_type": "llama", "hidden_size": "wide"}': "has a config.json that transformers refuses",
        '{"model_type": "llama", "vocab_size": 9, "pad_token_id": 9}': "has pad_token_id=9, but its vocabulary",
        '{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}': "holds quantised weights (fp8)",
    }.items():
        file.write_text(text)
        result = check("--model", tmp_path)
        assert result.exit_code == 2 and told in result.output, result.output
    file.rename(tmp_path / "adapter_config.json")
    assert "holds an adapter (adapter_config.json) and not the model" in check("--model", tmp_path).output


def test_a_damaged_file_does_not_hold_and_is_named(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    result = check("--model", tmp_path)
    assert result.exit_code == 1 and f"{file} is damaged" in result.output and "was cut short" in result.output
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    result = check("--model", tmp_path)
    assert result.exit_code == 1 and "holds two models' weights" in result.output


def test_no_npu_is_looked_for_unless_asked_for_or_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(check_folder.devices, "npu_problem", lambda: asked.append("problem") or "There is none.")
    monkeypatch.setattr(check_folder.devices, "npu_device_count", lambda: asked.append("count") or 0)
    monkeypatch.setattr(check_folder.devices, "idle_npus", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_folder.device_type("auto", 4) == "cpu" and check_folder.device_type("cpu", 4) == "cpu"
    assert not asked and "torch_npu" not in sys.modules
    with pytest.raises(DeviceError, match="--device npu cannot be used here: There is none. Or use --device cpu"):
        check_folder.device_type("npu", 2)
    # Cards that are there are not passed over for the CPU.
    monkeypatch.setattr(check_folder.devices, "idle_npus", lambda _: "This machine has Ascend devices.")
    monkeypatch.setattr(check_folder.devices, "npu_device_count", lambda: 2)
    assert check_folder.device_type("auto", 2) == "npu"
    with pytest.raises(ConfigError, match="has 2 devices here, and --data times --tensor asks for 4 ranks"):
        check_folder.device_type("auto", 4)
    with pytest.raises(ConfigError, match="float64 cannot be computed on npu. Use one of float32, bfloat16"):
        check_folder.check_dtype("float64", "npu")


def with_tokenizer(place: Path, size: int) -> None:
    words = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words |= {f"<spare {index}>": index for index in range(len(words), size)}
    tokens = Tokens(models.BPE(vocab=words, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(place)


def test_the_tokenizer_is_held_against_the_vocabulary(tmp_path: Path) -> None:
    config = tiny_config("llama", vocab_size=300)
    missing = check_folder.read_tokenizer(str(tmp_path), 300)
    assert missing.ids is None and not missing.fault and "none in this folder" in missing.line
    batch = check_folder.batch_of(config, missing, 2, 9)
    assert batch["input_ids"].shape == (2, 9) and batch["input_ids"].unique().numel() > 9
    with_tokenizer(tmp_path, 280)
    fits = check_folder.read_tokenizer(str(tmp_path), 300)
    assert not fits.fault and "280 tokens; the model's vocabulary has 300, 20 of them unused" in fits.line
    text = check_folder.batch_of(config, fits, 2, 400)["input_ids"]
    # Longer than the text, which then begins again; and no row is another one.
    assert text.shape == (2, 400) and int(text.max()) < 280 and not torch.equal(text[0], text[1])
    large = check_folder.read_tokenizer(str(tmp_path), 200)
    assert large.fault and large.ids is None and "the model lacks ids from 200 on" in large.line
    (tmp_path / "tokenizer.json").write_text("{")
    broken = check_folder.read_tokenizer(str(tmp_path), 300)
    assert broken.fault and broken.ids is None and "cannot be loaded" in broken.line


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen2_moe", "mixtral", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_once_and_active_ones_without_idle_experts(family: str, tied: bool) -> None:
    config = tiny_config(family, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    structure = check_folder.Structure.of(config)
    assert structure.parameters == sum(parameter.numel() for parameter in model.parameters())
    experts = [p for name, p in model.named_parameters() if ".mlp.experts." in name]
    idle = sum(p.numel() // len(p) * (len(p) - config.num_experts_per_tok) for p in experts)
    assert structure.active == structure.parameters - idle and (idle > 0) == (family != "llama")


def test_a_model_beyond_this_hosts_memory_is_refused_and_one_process_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 10_000_000)
    monkeypatch.setattr(ranks, "run_ranks", lambda *_, **__: pytest.fail("a process was started"))
    result = check("--model", folder, "--tensor", 2, "--device", "cpu")
    assert result.exit_code == 2 and "in 2 ranks of float32 needs about" in result.output
    assert "9.5 MiB free. Use --dtype bfloat16" in result.output


def test_more_of_everything_needs_more_memory() -> None:
    config = tiny_config("deepseek_v2", vocab_size=50_000)
    structure = check_folder.Structure.of(config)

    def run(layout: Layout, dtype: str = "float32", length: int = 64, rows: int = 2) -> Any:
        return structure.run(config, layout, Options(), dtype, rows, length)

    one = check_folder.rank_bytes(run(Layout(1, 1, 1)))
    weights = structure.parameters * 4
    assert one > 2 * weights
    assert (
        check_folder.rank_bytes(run(Layout(1, 4, 4))) < one < check_folder.rank_bytes(run(Layout(1, 1, 1), length=128))
    )
    assert check_folder.rank_bytes(run(Layout(1, 1, 1), dtype="bfloat16")) < one
    four = run(Layout(1, 4, 4), dtype="bfloat16")
    # One process computes the whole in float32, whatever the ranks do.
    assert check_folder.alone_bytes(four, backward=True) == one
    assert weights < check_folder.alone_bytes(four, backward=False) < one
    assert check_folder.alone_bytes(run(Layout(1, 1, 1), dtype="float64"), backward=True) > one


def test_a_head_that_is_the_embedding_needs_memory_once() -> None:
    def kept(*, tied: bool) -> int:
        config = tiny_config("llama", tie_word_embeddings=tied)
        return kept_for_the_run(
            check_folder.Structure.of(config).run(config, Layout(1, 1, 1), Options(), "float32", 2, 64)
        )

    config = tiny_config("llama")
    # Its weights and their gradients.
    assert kept(tied=False) - kept(tied=True) == 2 * 4 * config.vocab_size * config.hidden_size


def test_the_peak_of_a_stretch_of_work_is_seen() -> None:
    with host_memory.HostPeak() as peak:
        block = torch.ones(15_000_000)
        # Longer than a busy machine may take to look.
        time.sleep(0.2)
        del block
    # Memory that was freed before it began may be used again.
    assert 40e6 < peak.grown < 150e6
    assert 0 < host_memory.available_bytes() and host_memory.anonymous_bytes() > 50e6


def test_the_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = (tmp_path / "max", tmp_path / "current")
    monkeypatch.setattr(host_memory, "_LIMITS", (files,))
    free = host_memory.available_bytes()
    files[0].write_text("1000000\n")
    files[1].write_text("400000\n")
    assert host_memory.available_bytes() == 600_000
    files[0].write_text("max\n")
    assert host_memory.available_bytes() > min(free, 10**8) // 2
