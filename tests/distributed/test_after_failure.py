"""A model over data ranks after a run that failed.

Catches what FSDP leaves in the middle of a pass: whole parameters where slices belong, a model that cannot be given
back or trained again, gradients of the failed step in the next one.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from test_data_parallel import SETTINGS, Module, ordered, strategy, trainer


class FailOnce(Callback):
    """An error in the second step, in the middle of the forward or the backward pass, on all ranks."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            layer = pl_module.network.model.layers[1].mlp
            self.handle = layer.register_forward_hook(self.fail_forward)

    def fail_forward(self, layer: Any, inputs: Any, output: torch.Tensor) -> None:
        if self.where == "forward":
            raise RuntimeError("came to grief")
        output.register_hook(self.fail_backward)

    def fail_backward(self, gradient: torch.Tensor) -> None:
        raise RuntimeError("came to grief")


def goes_on(rank: int, world_size: int, settings: dict[str, Any], where: str) -> tuple[list[float], list[str]]:
    """The losses of a fit after one that failed, or was ended, with one step made; what closing complained of."""
    module, last = Module(), FailOnce(where)
    arguments: dict[str, Any] = {"devices": world_size, "use_distributed_sampler": False, "max_epochs": 1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if where == "nowhere":
            trainer(**arguments, max_steps=1, strategy=strategy(**settings)).fit(module, ordered(rank, 2, 2))
        else:
            with pytest.raises(RuntimeError, match="came to grief"):
                trainer(**arguments, callbacks=[last], strategy=strategy(**settings)).fit(module, ordered(rank, 2, 2))
            last.handle.remove()
    module.losses.clear()
    trainer(**arguments, strategy=strategy(**settings)).fit(module, ordered(rank, 2, 2))
    return module.losses, [str(one.message) for one in caught if "closed" in str(one.message)]


@pytest.mark.parametrize("name", ["experts divided", "replicate"])
def test_a_model_trains_on_after_a_run_that_failed(on_ranks: Any, name: str) -> None:
    ranks, settings = SETTINGS[name]
    wanted, _ = on_ranks(goes_on, ranks, settings, "nowhere", backend=None)[0]
    for where in ("forward", "backward"):
        for losses, complaints in on_ranks(goes_on, ranks, settings, where, backend=None):
            assert losses == wanted and not complaints, (where, losses, wanted, complaints)
