"""Recomputed layers leave nothing behind. Catches a result of the second run that keeps all its activations alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from lightning_npu_tp.convert.convert import Options, convert
from lightning_npu_tp.kernels import select
from lightning_npu_tp.models.moe import block as moe_block
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes
from lightning_npu_tp.tools.testing.models import random_batch, reference_model, tiny_deepseek_v2_config


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_balance_losses_of_the_second_run_are_not_kept(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_deepseek_v2_config(aux_loss_alpha=0.001)
    model, meshes = reference_model(config), Meshes.build(Layout(1, 1, 1), "cpu")
    convert(
        model,
        meshes=meshes,
        groups=Groups(meshes),
        kernels=select("cpu"),
        device=torch.device("cpu"),
        dtype=None,
        seed=0,
        options=Options(recompute="block"),
    )
    compute, made = moe_block.sequence_balance_loss, []

    def watched(*arguments: object, **settings: object) -> torch.Tensor:
        loss = compute(*arguments, **settings)  # type: ignore[arg-type]
        made.append(weakref.ref(loss))
        return loss

    monkeypatch.setattr(moe_block, "sequence_balance_loss", watched)
    output = model.train()(**random_batch(config, 2, 12, seed=0))
    layers = len(made)
    (output.loss + output.aux_loss).backward()
    # They hang on the graph of the recomputed layer, which no backward pass goes through and frees.
    assert layers == 2 and len(made) == 2 * layers
    assert [loss() for loss in made[layers:]] == [None, None]
