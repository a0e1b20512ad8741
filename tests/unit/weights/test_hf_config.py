"""config.json and generation_config.json of an export.

Catches a setting that stands under transformers 5's name alone, one that transformers 5 reads otherwise than it was
trained with, and settings of training that make generation slow or fail.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GenerationConfig

from lightning_npu_tp.models.families.registry import FAMILIES
from lightning_npu_tp.tools.testing.models import tiny_config
from lightning_npu_tp.weights.hf_config import told_of_readers, write_config, write_generation_config

YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 8.0, "original_max_position_embeddings": 160}
PLAIN = {"rope_type": "default", "rope_theta": 2e5}
# As transformers 4.57's classes name the number of experts.
EXPERTS = {"deepseek_v2": "n_routed_experts", "deepseek_v3": "n_routed_experts", "mixtral": "num_local_experts"} | {
    name: "num_experts" for name in ("olmoe", "qwen2_moe", "qwen3_moe")
}


def written(folder: Path, config: Any) -> dict[str, Any]:
    write_config(folder, config, class_name="A", dtype=torch.bfloat16)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
@pytest.mark.parametrize("rope", [YARN, PLAIN], ids=["yarn", "plain"])
def test_both_forms_are_there_and_transformers_5_reads_what_was_trained(
    tmp_path: Path, family: str, rope: dict[str, Any]
) -> None:
    config = tiny_config(family, rope_parameters=dict(rope))
    values = written(tmp_path, config)
    assert values["rope_theta"] == rope["rope_theta"] and values["rope_parameters"] == config.rope_parameters
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    assert values["rope_scaling"] == (scaling if rope is YARN else None)
    if family in EXPERTS:
        assert values[EXPERTS[family]] == (16 if family == "deepseek_v3" else 8)
    assert values["dtype"] == values["torch_dtype"] == "bfloat16" and values["architectures"] == ["A"]
    read = AutoConfig.from_pretrained(tmp_path).to_dict()
    others = {"dtype", "architectures", "use_cache", "_name_or_path"}
    assert {k: v for k, v in read.items() if k not in others} == {
        k: v for k, v in config.to_dict().items() if k not in others
    }
    assert not config.use_cache and config.architectures is None, "the run's own config was changed"


def test_what_is_for_training_alone_stays_there(tmp_path: Path) -> None:
    values = written(tmp_path, tiny_config("qwen3_moe", use_cache=False, output_router_logits=True))
    assert values["use_cache"] is True and values["output_router_logits"] is False
    assert "output_router_logits" not in written(tmp_path, tiny_config("llama"))
    write_generation_config(tmp_path, GenerationConfig(use_cache=False, eos_token_id=7), None)
    values = json.loads((tmp_path / "generation_config.json").read_text())
    assert values["use_cache"] is True and values["eos_token_id"] == 7


def test_the_authors_settings_of_generation_are_kept(tmp_path: Path) -> None:
    published, out = tmp_path / "published", tmp_path / "out"
    published.mkdir()
    out.mkdir()
    own = GenerationConfig(eos_token_id=7)
    (published / "generation_config.json").write_text('{"temperature": 0.6, "use_cache": false}')
    write_generation_config(out, own, published)
    assert json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.6, "use_cache": True}
    (published / "generation_config.json").write_text("[")
    write_generation_config(out, own, published)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 7


def test_a_factor_that_4_57_leaves_out_is_told() -> None:
    (told,) = told_of_readers(tiny_config("deepseek_v2"))
    assert "transformers 4.57 leaves mscale_all_dim=0.707 out" in told
    assert not told_of_readers(tiny_config("deepseek_v3"))
    assert not told_of_readers(tiny_config("deepseek_v2", rope_parameters=dict(YARN)))
