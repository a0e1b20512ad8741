"""A run that starts from a Hugging Face folder: `model.path`.

Catches weights that are not the folder's, a config that is not, code of a folder that is run, and a folder that is read
although a checkpoint takes its place.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.checkpoint import training_state
from lightning_npu_tp.errors import CheckpointError, ConfigError
from lightning_npu_tp.tools.testing.models import tiny_config
from lightning_npu_tp.weights import load
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
    for path, command in {"modelscope://a/b": "a/b FOLDER --from modelscope", "hf://a/b": "a/b FOLDER"}.items():
        with pytest.raises(ConfigError, match=f"ranks fetch nothing. Run `lightning-npu-tp download {command}`"):
            read_folder_config(path)
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
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="adapter holds an adapter .* and not the model"):
        read_folder_config(str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match="The model's config has pad_token_id=9, but its vocabulary of vocab_size=9 "):
        LitCausalLM(architecture="llama", config={"vocab_size": 9, "pad_token_id": 9})
    LitCausalLM(architecture="llama", config={"vocab_size": 9, "pad_token_id": 8})
    with pytest.raises(ConfigError, match="set model.path to a Hugging Face folder, or both"):
        LitCausalLM()


def fit(folder: Path, path: Any, monkeypatch: pytest.MonkeyPatch, *, strict: bool = True, steps: int = 1) -> Any:
    """A run of one process: its trainer, its module, and the tensors that were read from the folder."""
    found: list[str] = []
    read = load.SliceReader.read

    def noted(self: Any, stored: Any, *args: Any) -> None:
        found.append(str(stored))
        read(self, stored, *args)

    monkeypatch.setattr(load.SliceReader, "read", noted)
    module = LitCausalLM(path=str(folder), optimizer=partial(torch.optim.SGD, lr=0.1))
    module.strict_loading = strict
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy=NPUTensorParallelStrategy(), logger=False, max_steps=steps,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder.parent,
        callbacks=[ModelCheckpoint(folder.parent / "run", save_top_k=0)], limit_val_batches=0,
    )  # fmt: skip
    tokens = torch.randint(0, 264, (4, 12), generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in tokens], batch_size=2)
    try:
        trainer.fit(module, loader, loader, ckpt_path=path)
    finally:
        monkeypatch.undo()
    return trainer, module, found


def weights(module: LitCausalLM) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().full_tensor() for name, parameter in module.named_parameters()}


@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*does not have many workers", "ignore:.*resumable")
def test_a_resumed_run_does_not_read_the_folders_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But a run whose checkpoint may lack weights does, and so does one that finds no checkpoint."""
    saved = folder.parent / "run/one.ckpt"
    trainer, module, found = fit(folder, "auto", monkeypatch)
    assert found
    with trainer.strategy.process_group():
        trainer.save_checkpoint(saved)
        wanted = weights(module)
    for path in (str(saved), "auto"):
        trainer, module, found = fit(folder, path, monkeypatch)
        with trainer.strategy.process_group():
            assert not found and all(torch.equal(value, wanted[name]) for name, value in weights(module).items())
    # Without its norm, which the folder has.
    lacking, absent = folder.parent / "lacking.ckpt", "model.model.norm.weight"
    states = training_state.model_state
    monkeypatch.setattr(
        training_state, "model_state", lambda *a, **k: {n: v for n, v in states(*a, **k).items() if n != absent}
    )
    with trainer.strategy.process_group():
        trainer.save_checkpoint(lacking)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=f"{absent} is missing"):
        fit(folder, str(lacking), monkeypatch)
    trainer, module, found = fit(folder, str(lacking), monkeypatch, strict=False)
    with trainer.strategy.process_group():
        assert found and torch.equal(weights(module)[absent], torch.ones(64))
    # The folder's weights are not needed any more; that they are gone is said.
    (folder / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="goes on with the weights of its checkpoint, although"):
        fit(folder, str(saved), monkeypatch)
