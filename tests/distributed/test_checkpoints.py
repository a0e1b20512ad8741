"""Checkpoints through the trainer.

Catches a resume that does not continue where the run stopped, optimizer state that is lost or given to the wrong
parameter, hyper-parameters that make a checkpoint unreadable, and a damaged or foreign checkpoint taken for a good one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from test_strategy import WORLD, Module, data, trainer, whole

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.errors import CheckpointError


def strategy() -> NPUTensorParallelStrategy:
    return NPUTensorParallelStrategy(init_seed=0)


class Recorder(Module):
    """Keeps the weights of the end, while they can still be gathered."""

    def on_train_end(self) -> None:
        self.weights = whole(self)


def resumed(rank: int, world_size: int, folder: str, optimizer: str) -> dict[str, Any]:
    straight = Recorder(optimizer=optimizer)
    trainer(strategy(), max_epochs=2).fit(straight, data())
    first = Recorder(optimizer=optimizer)
    run = trainer(strategy(), max_epochs=1)
    run.fit(first, data())
    run.save_checkpoint(f"{folder}/half.ckpt")
    second = Recorder(optimizer=optimizer)
    trainer(strategy(), max_epochs=2).fit(second, data(), ckpt_path=f"{folder}/half.ckpt")
    return {
        "straight": straight.losses,
        "resumed": first.losses + second.losses,
        "weights": [straight.weights, second.weights],
    }


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_run_goes_on_bit_for_bit(on_ranks: Any, tmp_path: Path, optimizer: str) -> None:
    for result in on_ranks(resumed, WORLD, str(tmp_path), optimizer, backend=None):
        assert len(result["straight"]) == 8
        assert result["resumed"] == result["straight"]
        wanted, actual = result["weights"]
        assert all(torch.equal(actual[name], value) for name, value in wanted.items())


class WithHyperparameters(Module):
    """Saves a DictConfig, as a Hydra project does without thinking of it."""

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


def hyperparameters(rank: int, world_size: int, folder: str) -> list[Any]:
    settings = OmegaConf.create({"deep": {"list": [1, "${deep.value}"], "value": 2}})
    kept = []
    run = trainer(strategy())
    run.fit(WithHyperparameters(settings), data())
    run.save_checkpoint(f"{folder}/a.ckpt")
    again = trainer(strategy(), max_epochs=2)
    module = WithHyperparameters(settings)
    module.on_load_checkpoint = lambda checkpoint: kept.append(checkpoint["hyper_parameters"])
    again.fit(module, data(), ckpt_path=f"{folder}/a.ckpt")
    return kept


def test_configs_in_the_hyperparameters_are_stored_as_plain_containers(on_ranks: Any, tmp_path: Path) -> None:
    for kept in on_ranks(hyperparameters, WORLD, str(tmp_path), backend=None):
        assert kept == [{"settings": {"deep": {"list": [1, 2], "value": 2}}}]
        assert type(kept[0]["settings"]) is dict


def damage(rank: int, world_size: int, folder: str) -> None:
    run = trainer(strategy())
    run.fit(Module(), data())
    run.save_checkpoint(f"{folder}/good")
    run.save_checkpoint(f"{folder}/weights", weights_only=True)
    if rank == 0:
        # A shard of a larger world, as an earlier run may have left it under this name.
        Path(f"{folder}/good/__7_0.distcp").touch()
    run.save_checkpoint(f"{folder}/good")
    if rank == 0:
        assert not Path(f"{folder}/good/__7_0.distcp").exists()
        shutil.copytree(f"{folder}/good", f"{folder}/incomplete")
        Path(f"{folder}/incomplete/manifest.json").unlink()
        torch.save({"state_dict": {}, "evil": Module}, f"{folder}/pickled")
        torch.save({"weights": 1}, f"{folder}/other")
    run.strategy._open()
    run.strategy.barrier()
    run.strategy._close()
    for name, complaint in {
        "incomplete": "is incomplete: it has shards but no manifest.json",
        "absent": "is no checkpoint",
        "pickled": "could run code.*checkpoint_weights_only=false",
        "other": "has no 'state_dict'",
        "weights": "holds no state of optimizer 0",
    }.items():
        with pytest.raises(CheckpointError, match=complaint):
            trainer(strategy()).fit(Module(), data(), ckpt_path=f"{folder}/{name}")
    with pytest.raises(CheckpointError, match="head.weight is missing; head.bias is missing"):
        trainer(strategy()).fit(Module(extra=True), data(), ckpt_path=f"{folder}/good")
    trainer(strategy()).validate(Module(), data(), ckpt_path=f"{folder}/weights", verbose=False)
    with pytest.raises(CheckpointError, match="a file of that name exists"):
        run.save_checkpoint(f"{folder}/other")


def test_a_checkpoint_that_cannot_be_loaded_says_why(on_ranks: Any, tmp_path: Path) -> None:
    on_ranks(damage, WORLD, str(tmp_path), backend=None, timeout=90)
    assert torch.load(tmp_path / "other", weights_only=True) == {"weights": 1}, "a user's file was overwritten"
    command = [sys.executable, "-m", "lightning.pytorch.utilities.consolidate_checkpoint", str(tmp_path / "good")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    merged = torch.load(tmp_path / "good.consolidated", weights_only=True)
    assert merged["state_dict"]["network.lm_head.weight"].shape == (128, 64)
    assert merged["optimizer_states"][0]["state"]["network.lm_head.weight"]["exp_avg"].shape == (128, 64)


def shape_mismatch(rank: int, world_size: int, folder: str, source: str) -> None:
    run = trainer(strategy())
    run.fit(Module(), data())
    run.save_checkpoint(f"{folder}/good")
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \(128, 64\) instead of \(64, 64\)"):
        trainer(strategy()).fit(Module(source), data(), ckpt_path=f"{folder}/good")


def test_a_checkpoint_of_another_size_is_named(on_ranks: Any, tmp_path: Path) -> None:
    from test_strategy import config
    from transformers import DeepseekV2ForCausalLM

    DeepseekV2ForCausalLM(config(vocab_size=64)).save_pretrained(tmp_path / "small")
    on_ranks(shape_mismatch, WORLD, str(tmp_path), str(tmp_path / "small"), backend=None)
