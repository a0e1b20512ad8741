"""Lightning's own consolidation script on the folders that this package saves.

Catches a folder that the script cannot read, and a file of it whose names or values are not those of the plain
transformers model.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from test_checkpoints import Recorder, strategy
from test_strategy import WORLD, data, trainer
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.models.families.registry import FAMILIES
from lightning_npu_tp.tools.testing.models import tiny_config
from lightning_npu_tp.tools.testing.sharded import whole


class Plain(LightningModule):
    """A transformers model of every family, as any LightningModule holds them."""

    def __init__(self) -> None:
        super().__init__()
        configs = {family.name: tiny_config(family.name) for family in FAMILIES}
        self.networks = nn.ModuleDict({name: AutoModelForCausalLM.from_config(one) for name, one in configs.items()})

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        losses = [network(input_ids=batch, labels=batch).loss for network in self.networks.values()]
        return torch.stack(losses).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Sharded(Plain):
    """Keeps the weights of the end by transformers' names."""

    def on_train_end(self) -> None:
        self.weights = {name: whole(value).detach().clone() for name, value in self.state_dict().items()}


def one_step(rank: int, world_size: int, folder: str) -> dict[str, torch.Tensor]:
    module, run = Sharded(), trainer(strategy(), max_steps=1)
    run.fit(module, data())
    run.save_checkpoint(f"{folder}/saved.ckpt")
    return module.weights


def consolidated(path: Path) -> Path:
    command = [sys.executable, "-m", "lightning.pytorch.utilities.consolidate_checkpoint", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return path.with_name(f"{path.name}.consolidated")


def test_one_command_makes_a_file_that_plain_modules_of_all_families_load(on_ranks: Any, tmp_path: Path) -> None:
    trained, _ = on_ranks(one_step, WORLD, str(tmp_path), backend=None, timeout=200)
    content = torch.load(consolidated(tmp_path / "saved.ckpt"), weights_only=True)
    plain = Plain()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    plain.load_state_dict(content["state_dict"], strict=True)
    after = plain.state_dict()
    assert after.keys() == trained.keys() and len(plain.networks) == 9
    assert all(torch.equal(after[name], value) for name, value in trained.items())
    for name in plain.networks:
        assert any(not torch.equal(after[key], before[key]) for key in after if key.startswith(f"networks.{name}."))
    states = content["optimizer_states"][0]["state"]
    assert {name: states[name]["exp_avg"].shape for name in states} == {
        name: parameter.shape for name, parameter in plain.named_parameters()
    }


def half_way(rank: int, world_size: int, folder: str) -> list[float]:
    straight = Recorder()
    trainer(strategy(), max_epochs=2).fit(straight, data())
    run = trainer(strategy(), max_epochs=1)
    run.fit(Recorder(), data())
    run.save_checkpoint(f"{folder}/half.ckpt")
    return straight.losses


def going_on(rank: int, world_size: int, path: str) -> list[float]:
    module = Recorder()
    trainer(strategy(), max_epochs=2).fit(module, data(), ckpt_path=path)
    return module.losses


def test_a_run_goes_on_from_the_consolidated_file_too(on_ranks: Any, tmp_path: Path) -> None:
    straight, _ = on_ranks(half_way, WORLD, str(tmp_path), backend=None)
    path = consolidated(tmp_path / "half.ckpt")
    for losses in on_ranks(going_on, WORLD, str(path), backend=None):
        assert len(losses) == 4 and losses == straight[4:]


def test_the_setting_for_one_file_is_refused_with_the_command() -> None:
    from lightning_npu_tp import NPUTensorParallelStrategy

    with pytest.raises(ConfigError, match=r"save_distributed_checkpoint no longer exists.*consolidate_checkpoint CKPT"):
        NPUTensorParallelStrategy(save_distributed_checkpoint=False)
    with pytest.raises(TypeError, match="has no argument 'tensor_parallel'"):
        NPUTensorParallelStrategy(tensor_parallel=2)
