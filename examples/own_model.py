"""A model of your own, sharded in two ways: with a `ModelFamily`, or with a `convert=` function.

    python examples/own_model.py family
    python examples/own_model.py convert

The family is a table and a few constructors: the same machinery as for the built-in models, with
initial weights that do not depend on the layout. The function may do anything; here it calls torch's
`parallelize_module`.
"""

import sys
from types import SimpleNamespace

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_npu_tp import ModelFamily, NPUTensorParallelStrategy
from lightning_npu_tp.models import Columns, Rows, ShardedMLP

HIDDEN, WIDTH, LAYERS = 32, 64, 2


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.up_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.down_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        """x: [..., HIDDEN]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Regressor(nn.Module):
    """A residual stack of gated MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(initializer_range=0.1)
        self.layers = nn.ModuleList(GatedMLP() for _ in range(LAYERS))

    def forward(self, x):
        """x: [batch, HIDDEN]."""
        for layer in self.layers:
            x = x + layer(x)
        return x


REGRESSOR = ModelFamily(
    name="regressor",
    model_class="Regressor",
    plan=lambda config: {
        "layers.*.gate_proj.weight": Columns(),
        "layers.*.up_proj.weight": Columns(),
        "layers.*.down_proj.weight": Rows(),
    },
    swaps={"GatedMLP": lambda source, context: ShardedMLP(source, context.region)},
    units=lambda config: {},
    expected=lambda config: {"GatedMLP": LAYERS},
)


def shard_with_torch(module: LightningModule, meshes) -> None:
    """Shard `module.network` with torch's own tensor-parallel styles."""
    styles = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    for layer in module.network.layers:
        parallelize_module(layer, meshes.dense["tensor_parallel"], styles)


class LitRegressor(LightningModule):
    """Learns y = -x."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = Regressor()

    def training_step(self, batch, batch_idx):
        """Mean squared error."""
        loss = nn.functional.mse_loss(self.network(batch), -batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        """Any optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(how: str = "family", devices: int = 2, **trainer_arguments) -> Trainer:
    """Fit for a few epochs; returns the trainer."""
    sharding = {"families": [REGRESSOR]} if how == "family" else {"convert": shard_with_torch}
    generator = torch.Generator().manual_seed(1)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=NPUTensorParallelStrategy(**sharding),
        max_epochs=20,
        enable_checkpointing=False,
        logger=False,
        **trainer_arguments,
    )
    trainer.fit(LitRegressor(), DataLoader(torch.randn(64, HIDDEN, generator=generator), batch_size=16))
    return trainer


if __name__ == "__main__":
    final = train(*sys.argv[1:2]).callback_metrics["loss"]
    print(f"final loss {final:.3f}")
