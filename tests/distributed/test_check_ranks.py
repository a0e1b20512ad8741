"""`check` as a user runs it, on ranks: what it prints, holds against one process, and how much a rank holds.

Catches a check that passes whatever the numbers are, a rank that loads the whole model, slices or experts that come to
the wrong rank unseen, and an error of the files that one process alone tells by a traceback.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.tools import check_ranks, host_memory
from lightning_npu_tp.tools.check_ranks import AloneAnswer, RankAnswer, Request, run_rank
from lightning_npu_tp.tools.cli import app
from lightning_npu_tp.tools.testing import ranks
from lightning_npu_tp.tools.testing.models import random_batch, tiny_config

SMALL = {
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 8,
    "initializer_range": 0.1,
}


def saved(folder: Path, family: str, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(tiny_config(family, **config)).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture
def check(on_ranks: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command, its ranks in processes that are kept."""
    monkeypatch.setattr(ranks, "run_ranks", on_ranks)
    return lambda *arguments: CliRunner().invoke(app, ["check", "--device", "cpu", *map(str, arguments)])


def test_the_four_steps_and_the_comparison(check: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "deepseek_v2", torch.bfloat16, **SMALL)
    file = tmp_path / "check.json"
    result = check("--model", folder, "--tensor", 4, "--length", 12, "--json", file)
    assert result.exit_code == 0, result.output
    steps = [line for line in result.output.splitlines() if line.startswith("[")]
    assert steps == ["[1/4] tokenizer", "[2/4] load", "[3/4] MoE structure", "[4/4] conversion"]
    assert "none in this folder" in result.output and "64 experts, top 6, of width 8" in result.output
    assert "2 layers: 1 dense, 1 with experts" in result.output and "1 DeepseekV2Moe" in result.output
    assert [f"rank {rank}: 64 experts -> 16 local experts" in result.output for rank in range(4)] == [True] * 4
    assert "logits [1, 12, 128]" in result.output and "check passed" in result.output
    assert max(len(line) for line in result.output.splitlines() if str(folder) not in line) <= 100
    told = json.loads(file.read_text())
    assert told["passed"] and told["faults"] == [] and told["file_bytes"] == 2 * told["parameters"]
    assert told["relative_differences"].keys() == {"loss", "logits", "gradient norm"}
    # Of float32 in another order; exactly nothing would say that nothing was compared.
    assert 0 < told["relative_differences"]["logits"] < 1e-5
    for rank in told["ranks"]:
        assert rank["local_experts"] == 16 and rank["weight_bytes"] == 4 * rank["parameters"]
        # Files are bfloat16, of which each rank reads its own slices.
        assert rank["read_bytes"] == 2 * rank["parameters"] < told["file_bytes"] / 2
        assert len(rank["forward_seconds"]) == len(rank["backward_seconds"]) == 3


def test_float64_over_data_and_expert_ranks(check: Any, tmp_path: Path) -> None:
    folder, file = saved(tmp_path / "model", "mixtral"), tmp_path / "check.json"
    arguments = ["--data", 2, "--tensor", 2, "--expert", 4, "--sequence-parallel", "--recompute", "block"]
    # Uneven: three sequences over two data ranks, 13 tokens over two tensor ranks.
    more = ["--batch", 3, "--length", 13, "--dtype", "float64", "--json", file]
    result = check("--model", folder, *arguments, *more)
    assert result.exit_code == 0, result.output
    told = json.loads(file.read_text())
    assert 0 < max(told["relative_differences"].values()) < 1e-10
    assert told["layout"] == {"data": 2, "tensor": 2, "expert": 4} and told["output_shape"] == [3, 13, 128]


def test_numbers_beyond_the_bound_fail_and_are_named(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "model", "llama")
    monkeypatch.setitem(check_ranks.BOUNDS, "float32", 1e-12)
    result = check("--model", folder, "--tensor", 2, "--length", 8)
    assert result.exit_code == 1 and "check failed:" in result.output.splitlines()[-1]
    assert "logits" in result.output.splitlines()[-1]
    assert "none: llama, 2 layers, all of them dense" in result.output and "local experts" not in result.output


def test_any_rank_and_any_number_counts() -> None:
    logits = torch.ones(2, 3, 4)
    alone = AloneAnswer(loss=2.0, logits=logits, grad_norm=3.0, forward=0.0, backward=0.0, peak=0)
    good = [RankAnswer(loss=2.0, grad_norm=3.0, rows=(row, row + 1), logits=logits[row : row + 1]) for row in (0, 1)]
    assert set(check_ranks.compare(good, alone).values()) == {0.0}
    bad = RankAnswer(loss=2.0, grad_norm=3.0, rows=(1, 2), logits=logits[1:] * 1.5)
    assert check_ranks.compare([good[0], bad], alone)["logits"] == pytest.approx(0.5)
    for loss, norm, name in ((2.2, 3.0, "loss"), (2.0, 3.3, "gradient norm"), (float("nan"), 3.0, "loss")):
        found = check_ranks.compare([good[0], RankAnswer(loss=loss, grad_norm=norm)], alone)
        assert found[name] > 0.09, name


def test_one_process_is_left_out_where_memory_does_not_allow_it(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = saved(tmp_path / "model", "llama"), tmp_path / "check.json"
    free = iter([10**12, 10**6])
    monkeypatch.setattr(host_memory, "available_bytes", lambda: next(free))
    result = check("--model", folder, "--tensor", 2, "--length", 8, "--json", file)
    assert result.exit_code == 0 and "on the CPU: left out: transformers needs about" in result.output
    assert "not compared with one process" in result.output
    assert json.loads(file.read_text())["one_process"] is None


def test_files_that_do_not_fit_are_told_in_one_line(check: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "deepseek_v2", **SMALL)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
    result = check("--model", folder, "--tensor", 2)
    assert result.exit_code == 1 and f"1 tensors are missing ({name})" in result.output
    assert "Traceback" not in result.output and result.output.splitlines()[-1].startswith("error: ")


def test_no_rank_holds_the_whole_model(on_ranks: Any, tmp_path: Path) -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 4096, "head_dim": 128}
    folder = saved(tmp_path, "llama", **wide)
    whole = (folder / "model.safetensors").stat().st_size
    request = Request(
        folder=str(folder),
        config=tiny_config("llama", **wide),
        layout=Layout(1, 4, 4),
        options=Options(),
        device_type="cpu",
        dtype="float32",
        batch=random_batch(tiny_config("llama", **wide), 1, 4, seed=0),
        timeout=180.0,
    )
    for answer in on_ranks(run_rank, 4, request, backend=None):
        assert answer.local_bytes < 0.27 * whole
        # Above the shard there is what torch and the loader take for themselves; the whole would be four shards.
        assert answer.loading_peak < answer.local_bytes + 40e6 < 0.6 * whole, answer.loading_peak
