"""What people write about weights and gradients gives one process's numbers where these are sharded.

Catches a number that is one rank's part of a norm or a sum, a penalty whose gradient is scaled by the ranks,
expressions over parameters of several meshes and plain ones that torch refuses, and a log of a sharded value that
crashes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.tools.testing.models import reference_model, tiny_config
from lightning_npu_tp.tools.testing.reference import float64_reference, relative_difference
from lightning_npu_tp.tools.testing.sharded import whole

LENGTH = 11


def rows() -> Tensor:
    return torch.randint(2, 128, (4, LENGTH), generator=torch.Generator().manual_seed(7))


class Everyday(LightningModule):
    """Sharded parameters of two meshes and a plain layer; nothing in it knows of ranks."""

    def __init__(self, clips: float | None) -> None:
        super().__init__()
        self.network = reference_model(tiny_config("deepseek_v2", num_hidden_layers=2), attention="sdpa").train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.head = nn.Linear(64, 1, dtype=torch.float64)
        self.clips, self.found = clips, {}
        self.automatic_optimization = clips is None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        network, layers = self.network, self.network.model.layers
        # Before the model's first forward and after its last: FSDP has other tensors in the parameters' places then.
        penalty = layers[1].mlp.experts.down_proj.pow(2).sum() + network.model.embed_tokens.weight.norm()
        loss = network(input_ids=batch, labels=batch).loss
        hidden = network.model(input_ids=batch).last_hidden_state
        tied = F.linear(hidden, network.model.embed_tokens.weight).pow(2).mean()
        penalty = penalty + network.lm_head.weight.pow(2).sum() + layers[0].self_attn.o_proj.weight.abs().mean()
        loss = loss + 0.1 * penalty + self.head(hidden).pow(2).mean() + 0.1 * tied
        self.found["loss"] = self.trainer.strategy.reduce(loss.detach()).item()
        if self.clips is not None:
            self.zero_grad()
            self.manual_backward(loss)
            total = nn.utils.clip_grad_norm_(self.parameters(), self.clips)
            self.found["total"] = total.item()
            self.found["clipped"] = sum(p.grad.norm().item() ** 2 for p in self.parameters()) ** 0.5
            self.optimizers().step()
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.found["gradients"] = {name: whole(p.grad).clone() for name, p in self.named_parameters()}
        if self.clips is not None:
            return
        norms = grad_norm(self, norm_type=2)
        self.log_dict(norms)
        weight = self.network.lm_head.weight
        self.log("weight", weight.norm(), sync_dist=True)
        self.log("least", min(p.min() for p in self.parameters()), on_step=True, on_epoch=True)
        self.log("largest", max(p.grad.abs().max() for p in self.parameters()), sync_dist=True, reduce_fx="max")
        self.found["read"] = [weight.norm().item(), float(weight.mean()), weight.grad.norm(1).item()]
        self.found["compared"] = bool(weight.norm() > 1e6) or bool(weight.max() < 0)
        self.found["stacked"] = torch.stack([p.grad.norm() for p in self.parameters()]).norm().item()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor": (2, {"tensor_parallel_size": 2}),
    "shard": (2, {"data_parallel_size": 2}),
    "replicate": (2, {"data_parallel_size": 2, "data_parallel": "replicate"}),
    "all": (4, {"data_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel_size": 4}),
    "replicas": (4, {"data_parallel_size": 2, "tensor_parallel_size": 2}),
}


def train(rank: int, world_size: int, settings: dict[str, Any] | None, clips: float | None) -> dict[str, Any]:
    data = (settings or {}).get("data_parallel_size", 1)
    part = rows().chunk(data)[rank // (world_size // data)]
    module = Everyday(clips)
    run = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="auto" if settings is None else NPUTensorParallelStrategy(init_seed=0, **settings),
        precision="64-true",
        use_distributed_sampler=False,
        max_epochs=1,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(module, DataLoader(part, batch_size=len(part)))
    return {**module.found, "logged": {name: float(value) for name, value in run.callback_metrics.items()}}


def train_plain(rank: int, world_size: int) -> dict[float | None, dict[str, Any]]:
    with float64_reference():
        return {clips: train(0, 1, None, clips) for clips in (None, 0.05)}


@pytest.fixture(scope="module")
def plain(on_ranks: Any) -> dict[float | None, dict[str, Any]]:
    """What plain Lightning and transformers compute in one process, by the norm to clip at."""
    return on_ranks(train_plain, 1, backend=None)[0]


@pytest.mark.parametrize("clips", [None, 0.05], ids=["logged", "clipped"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_penalties_logs_and_clipping_are_those_of_whole_tensors(
    on_ranks: Any, plain: Any, layout: str, clips: float | None
) -> None:
    world_size, settings = LAYOUTS[layout]
    wanted = plain[clips]
    for found in on_ranks(train, world_size, settings, clips, backend=None, timeout=120):
        assert found.keys() == wanted.keys() and found["logged"].keys() == wanted["logged"].keys()
        for name, gradient in wanted.get("gradients", {}).items():
            assert relative_difference(found["gradients"][name], gradient) < 1e-10, name
        for name, value in wanted["logged"].items():
            # Lightning keeps what is logged in float32.
            assert found["logged"][name] == pytest.approx(value, rel=1e-6), name
        for name in wanted.keys() - {"gradients", "logged"}:
            assert found[name] == pytest.approx(wanted[name], rel=1e-10), name
