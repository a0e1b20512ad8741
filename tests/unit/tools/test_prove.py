"""Catches a small model that a layout cuts elsewhere than the real one (a proof of another model), and a command
line that starts processes for a layout that cannot be, or that tells a user's mistake by a traceback.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from typer.testing import CliRunner

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.tools import check_folder
from lightning_npu_tp.tools import prove as proving
from lightning_npu_tp.tools.cli import app
from lightning_npu_tp.tools.model_config import read_model_config
from lightning_npu_tp.tools.proof import Check, Proof, Worst
from lightning_npu_tp.tools.proof_batches import KINDS, kind_batches, not_compared, uneven_batches
from lightning_npu_tp.tools.prove import BOUNDS, check_layout, load_families
from lightning_npu_tp.tools.small_model import shrink, smaller
from lightning_npu_tp.tools.testing.models import reference_model, tiny_deepseek_v2_config

V2_LITE = "conf/model/deepseek_v2_lite.yaml"
CONFIGS: dict[str, Any] = {
    "deepseek_v2": DeepseekV2Config(
        num_attention_heads=128,
        num_key_value_heads=128,
        n_routed_experts=160,
        n_group=8,
        topk_group=3,
        num_experts_per_tok=6,
        topk_method="group_limited_greedy",
        first_k_dense_replace=1,
    ),
    "deepseek_v3": DeepseekV3Config(),
    "qwen2_moe": Qwen2MoeConfig(mlp_only_layers=[3]),
    "qwen3_moe": Qwen3MoeConfig(),
    "mixtral": MixtralConfig(),
    "olmoe": OlmoeConfig(),
    "llama_gqa": LlamaConfig(num_attention_heads=64, num_key_value_heads=8),
    "qwen3": Qwen3Config(num_attention_heads=12, num_key_value_heads=3, head_dim=96),
}
LAYOUTS = [Layout(1, 2, 2), Layout(2, 2, 4), Layout(1, 3, 3), Layout(1, 8, 8)]
SPLIT_BY_TENSOR = (
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_small_model_leaves_the_same_remainders_and_is_small(name: str, layout: Layout) -> None:
    config = CONFIGS[name]
    small = shrink(config, layout)
    assert type(small) is type(config)
    for key in SPLIT_BY_TENSOR:
        if getattr(config, key, None):
            assert getattr(small, key) % layout.tensor == getattr(config, key) % layout.tensor, key
    for key in ("n_routed_experts", "num_local_experts", "num_experts"):
        if getattr(config, key, None):
            assert getattr(small, key) % layout.expert == getattr(config, key) % layout.expert, key
            assert small.num_experts_per_tok <= getattr(small, key)
    with torch.device("meta"):
        model = reference_model(small)
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_widths_that_follow_from_others_follow(name: str) -> None:
    small = shrink(CONFIGS[name], Layout(1, 2, 2))
    assert small.head_dim == small.qk_rope_head_dim < CONFIGS[name].qk_rope_head_dim
    assert small.qk_head_dim == small.qk_nope_head_dim + small.qk_rope_head_dim


def test_one_layer_of_each_kind_stays() -> None:
    small = shrink(CONFIGS["qwen2_moe"], Layout(1, 2, 2))
    assert (small.num_hidden_layers, small.mlp_only_layers) == (3, [0])
    small = shrink(CONFIGS["deepseek_v3"], Layout(1, 2, 2))
    assert (small.num_hidden_layers, small.first_k_dense_replace) == (3, 1)
    small = shrink(CONFIGS["qwen3_moe"], Layout(1, 2, 2))
    assert (small.num_hidden_layers, small.mlp_only_layers) == (2, [])
    assert shrink(tiny_deepseek_v2_config(first_k_dense_replace=3), Layout(1, 2, 2)).num_hidden_layers == 1


def test_groups_of_experts_stay_and_hold_the_picks() -> None:
    small = shrink(CONFIGS["deepseek_v2"], Layout(1, 4, 4))
    assert small.n_group == 8 and small.topk_group == 3
    assert small.n_routed_experts % 8 == 0 and small.n_routed_experts // 8 * 3 >= small.num_experts_per_tok


def test_a_smaller_size_is_never_larger() -> None:
    for size in range(1, 60):
        for ranks in range(1, 9):
            less = smaller(size, 12, ranks)
            assert 1 <= less <= size and less % ranks == size % ranks and less < 12 + ranks


def test_batches_divide_by_nothing() -> None:
    for layout in (Layout(1, 2, 2), Layout(4, 1, 4), Layout(2, 8, 8)):
        first, second = (batch["input_ids"].shape for batch in uneven_batches(tiny_deepseek_v2_config(), layout))
        assert first[0] >= layout.data and first != second
        assert layout.data == 1 or first[0] % layout.data
        assert layout.tensor == 1 or (first[1] % layout.tensor and second[1] % layout.tensor)


def test_each_kind_of_batch_is_what_its_name_says() -> None:
    layout = Layout(1, 4, 4)
    batches = kind_batches(tiny_deepseek_v2_config(), layout, balance=True)
    assert batches.keys() == KINDS.keys() and "balance losses" not in kind_batches(
        tiny_deepseek_v2_config(), layout, balance=False
    )
    assert {kind for kind, batch in batches.items() if "attention_mask" in batch} == {"right padding", "left padding"}
    right, left = batches["right padding"], batches["left padding"]
    assert right["attention_mask"][:, 0].all() and not right["attention_mask"][:, -1].any()
    assert left["attention_mask"][:, -1].all() and not left["attention_mask"][:, 0].any()
    # Padding predicts nothing, on either side.
    assert not (left["labels"][:, 1:] != -100)[left["attention_mask"][:, :-1] == 0].any()
    starts = batches["packed documents"]["position_ids"] == 0
    assert (starts.sum(1) == 3).all() and not torch.equal(starts[0], starts[1])
    lengths = {kind: batch["input_ids"].shape[1] % layout.tensor for kind, batch in batches.items()}
    assert lengths.pop("packed documents") == 0 and all(lengths.values())


def test_what_is_left_out_is_told_with_the_reason() -> None:
    config = tiny_deepseek_v2_config(attention_dropout=0.1, seq_aux=False)
    dropout, balance = not_compared(config, Layout(2, 1, 2))
    assert dropout.startswith("attention_dropout=0.1 is left out: each tensor rank draws")
    assert balance.startswith("the balance loss with seq_aux=False")
    assert not_compared(tiny_deepseek_v2_config(seq_aux=False), Layout(1, 2, 2)) == []


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--tensor", "3"], ["16 heads", "[1, 2, 4, 8, 16]"]),
        (["--data", "5", "--expert", "5"], ["64 experts", "[1, 2, 4, 8, 16, 32, 64]"]),
        (["--tensor", "2", "--expert", "3"], ["expert_parallel_size=3"]),
        (["--tensor", "0"], ["--tensor 0"]),
        (["--tensor", "2", "--dtype", "float16"], ["float16", "float64"]),
        (["--tensor", "2", "--device", "tpu"], ["'tpu'", "'npu'"]),
        (["--tensor", "2", "--device", "npu"], ["--device npu", "--device cpu"]),
        (["--tensor", "2", "--recompute", "all"], ["recompute='all'"]),
        (["--data", "2", "--expert", "2", "--dispatch", "replicated"], ["dispatch=replicated"]),
        (["--tensor", "2", "--families", "json:NONE"], ["json:NONE", "package.module:NAME"]),
        (["--model", "nonsense"], ["nonsense", "deepseek_v2_tiny"]),
        (["--model", "pyproject.toml"], ["pyproject.toml"]),
    ],
)
def test_a_mistake_ends_with_one_line_and_code_2(arguments: list[str], expected: list[str]) -> None:
    model = [] if "--model" in arguments else ["--model", V2_LITE]
    result = CliRunner().invoke(app, ["prove", *model, *arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.output.splitlines()
    assert line.startswith("error: ") and all(text in line for text in expected), line


@pytest.mark.parametrize("device, dtype", [("cpu", "float64"), ("npu", "float32")])
def test_the_widest_dtype_of_the_device_is_proven(monkeypatch: pytest.MonkeyPatch, device: str, dtype: str) -> None:
    asked = {}

    def prove(*args: Any, **kwargs: Any) -> Proof:
        asked.update(kwargs)
        return _proof(Check("a", "split", Worst(1e-14, "x"), Worst(2e-14, "y")))

    monkeypatch.setattr(proving, "prove", prove)
    monkeypatch.setattr(check_folder, "device_type", lambda asked, ranks: asked if ranks == 2 else "")
    arguments = ["prove", "--model", V2_LITE, "--tensor", "2", "--device", device]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (asked["device"], asked["dtype"]) == (device, dtype)
    result = CliRunner().invoke(app, [*arguments, "--dtype", "float64"])
    assert asked["dtype"] == "float64" and "float64 on cpu" in result.output


def test_the_command_line_is_a_module_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["elsewhere", "prove", "--model", V2_LITE, "--tensor", "3"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("lightning_npu_tp", run_name="__main__")
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_a_rule_that_is_not_in_the_plan_is_refused_with_those_that_are() -> None:
    result = CliRunner().invoke(app, ["prove", "--model", "deepseek_v2_tiny", "--tensor", "2", "--break", "nothing"])
    assert result.exit_code == 2 and "lm_head.weight" in result.output and len(result.output.splitlines()) == 1


def test_a_model_is_read_from_a_folder_a_file_or_by_name(tmp_path: Path) -> None:
    tiny_deepseek_v2_config(vocab_size=77).save_pretrained(tmp_path)
    assert read_model_config(str(tmp_path)).vocab_size == 77
    assert read_model_config(str(tmp_path / "config.json")).vocab_size == 77
    assert read_model_config("deepseek_v2_lite").n_routed_experts == read_model_config(V2_LITE).n_routed_experts == 64
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(ConfigError, match="no_such_model"):
        read_model_config(str(tmp_path))


def test_a_layout_is_checked_at_the_real_sizes() -> None:
    config = read_model_config("deepseek_v2_lite")
    check_layout(config, Layout(1, 16, 16))
    with pytest.raises(ConfigError, match="64 experts"):
        check_layout(config, Layout(3, 1, 3))


def test_families_are_imported_by_name() -> None:
    (family,) = load_families(["lightning_npu_tp.models.families.deepseek_v2:DEEPSEEK_V2"])
    assert family.name == "deepseek_v2"
    with pytest.raises(ConfigError, match="Name a ModelFamily"):
        load_families(["json:dumps"])


def _proof(*checks: Check) -> Proof:
    layout = Layout(1, 2, 2)
    return Proof("some", layout, Options(), None, BOUNDS["float64"], "float64", "cpu", 3, list(checks))


def test_the_verdict_looks_at_gradients_and_at_parameters() -> None:
    good = Check("a", "split", Worst(1e-14, "x"), Worst(2e-14, "y"))
    bad = Check("b", "split", Worst(1e-14, "x"), Worst(1e-3, "y"))
    worse = Check("c", "split", Worst(float("inf"), "z"), Worst(0.0, "y"))
    assert _proof(good).failed == [] and "any number: worst 2.0e-14, bound 1e-10" in _proof(good).headline()
    assert _proof(good, bad).failed == [bad] and "(y)" in _proof(good, bad).headline()
    proof = _proof(good, bad, worse)
    assert proof.failed == [bad, worse] and proof.worst.where == "z"
    plain = json.loads(json.dumps(proof.as_json(), allow_nan=False))
    assert plain["checks"][2]["gradient"] == {"difference": "inf", "where": "z"} and plain["passed"] is False
