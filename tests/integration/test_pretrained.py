"""A run that starts from a Hugging Face folder: `model.path`.

Catches weights that are not the folder's, a config that is not, and code of a folder that is run.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.testing.models import tiny_config
from lit_models.causal_lm import LitCausalLM, read_folder_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = tiny_config("deepseek_v2")
    config.vocab_size = 264
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_loss_is_that_of_transformers(folder: Path) -> None:
    tokens = torch.randint(0, 264, (2, 12), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    wanted = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loader = torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in tokens], batch_size=2)
    trainer = Trainer(
        accelerator="cpu", devices=1, precision="64-true", strategy=NPUTensorParallelStrategy(), logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    (result,) = trainer.validate(LitCausalLM(path=str(folder)), loader, verbose=False)
    # Metrics are logged in float32.
    assert result["val/loss"] == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("how", ["default", "pretrained"])
def test_train_from_a_folder(folder: Path, tmp_path: Path, how: str) -> None:
    group = [] if how == "default" else ["model=pretrained"]
    small = ["data.max_tokens=4000", "data.max_val_tokens=600", "data.sequence_length=32", "trainer.max_steps=2"]
    command = [sys.executable, "train.py", *group, f"model.path={folder}", *small, "trainer.devices=2"]
    command += [
        f"hydra.run.dir={tmp_path}/run",
        "callbacks=none",
        "logger=csv",
        "+model.config_overrides.aux_loss_alpha=0.5",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert re.search(r"weights +│ \d+ tensors of", done.stdout + done.stderr)
    assert not done.stderr.count("Traceback")


def test_a_checkpoint_needs_no_folder(folder: Path) -> None:
    model = LitCausalLM(path=str(folder), config_overrides={"aux_loss_alpha": 0.25})
    again = LitCausalLM(**model.hparams)
    assert again.model_config.to_dict() == model.model_config.to_dict()
    assert again.model_config.aux_loss_alpha == 0.25 and again.model_config.vocab_size == 264


def test_code_in_a_folder_is_not_run_and_old_spellings_are_read(tmp_path: Path) -> None:
    """As DeepSeek-V2-Lite is published: code beside the weights, rope_scaling and rope_theta at the top."""
    published: dict[str, Any] = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
        "model_type": "deepseek_v2",
        "torch_dtype": "bfloat16",
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "rope_theta": 10000,
        "q_lora_rank": None,
        "topk_method": "greedy",
        "aux_loss_alpha": 0.001,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    (tmp_path / "configuration_deepseek.py").write_text("raise SystemExit('code of the folder was run')")
    config = LitCausalLM(path=str(tmp_path)).model_config
    wanted = AutoConfig.for_model("deepseek_v2").from_pretrained(tmp_path)
    assert type(config).__name__ == "DeepseekV2Config" and type(config).__module__.startswith("transformers.")
    assert config.rope_parameters == wanted.rope_parameters and config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["factor"] == 40 and config.aux_loss_alpha == 0.001


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config.json does not exist"):
        read_folder_config(str(tmp_path / "absent"))
    file = tmp_path / "config.json"
    for text in ("{", "[]", "{}"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="config.json cannot be used"):
            read_folder_config(str(tmp_path))
    file.write_text('{"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}}')
    with pytest.raises(ConfigError, match=r"quantised weights \(fp8\)"):
        read_folder_config(str(tmp_path))
    file.write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="'bert' is not supported"):
        LitCausalLM(path=str(tmp_path))
    with pytest.raises(ConfigError, match="set model.path to a Hugging Face folder, or both"):
        LitCausalLM()
