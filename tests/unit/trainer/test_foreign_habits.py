"""What a module from elsewhere does and nobody would notice is told: mixtures in eval mode, the other Lightning."""

from __future__ import annotations

import importlib
import warnings

import pytest
from torch import nn

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.trainer.module_setup import warn_of_eval_mode
from lightning_npu_tp.trainer.registration import register_with_lightning


class Mixture(nn.Linear):
    pending_tokens_per_expert = None


def test_mixtures_that_are_trained_in_eval_mode_are_told() -> None:
    module = nn.ModuleDict({"first": Mixture(1, 1), "second": Mixture(1, 1), "dense": nn.Linear(1, 1)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_eval_mode(module)
        # As a reference model is that nobody trains.
        warn_of_eval_mode(module.eval().requires_grad_(False))
    module.requires_grad_(True)
    with pytest.warns(
        UserWarning, match=r"first and 1 more mixtures are in eval mode.*without balance losses.*train\(\)"
    ):
        warn_of_eval_mode(module)


def test_the_other_lightnings_trainer_says_which_import_is_needed() -> None:
    # lightning requires it.
    other = importlib.import_module("pytorch_lightning")
    # As if the package were imported after it.
    register_with_lightning()
    for strategy in ("npu_tp", NPUTensorParallelStrategy()):
        with pytest.raises(
            (ConfigError, ValueError), match="import lightning.pytorch as pl instead of import pytorch_l"
        ):
            other.Trainer(strategy=strategy, accelerator="cpu")
    with pytest.raises(ConfigError, match="import lightning.pytorch as pl"):
        other.Trainer(accelerator="npu")
