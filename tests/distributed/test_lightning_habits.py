"""What a foreign module asks of Lightning gives the numbers of plain Lightning in one process, in float64.

Catches a callback or a call of Lightning's that takes shards for whole parameters, that loses what it restores, or that
trains something else than without the strategy. The model is a mixture: experts, other shards and a plain layer.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, callbacks, seed_everything
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.tools.testing.models import reference_model, tiny_config
from lightning_npu_tp.tools.testing.reference import float64_reference, relative_difference

# Rows of a global batch, batches of an epoch.
ROWS, BATCHES = 4, 2
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor": (2, {}),
    "shard": (2, {"data_parallel_size": 2}),
    "replicate": (2, {"data_parallel_size": 2, "data_parallel": "replicate"}),
    "four": (4, {"data_parallel_size": 2, "expert_parallel_size": 4}),
}


class Foreign(LightningModule):
    """A sharded model and a layer of its own; knows nothing of sharding."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        self.lr = lr
        self.backbone = reference_model(tiny_config("deepseek_v2", num_hidden_layers=2))
        self.head = nn.Linear(1, 1, dtype=torch.float64)
        nn.init.constant_(self.head.weight, 0.9)
        nn.init.constant_(self.head.bias, 0.1)
        self.weights: dict[str, torch.Tensor] = {}
        self.seen: list[Any] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        loss = self.head(self.backbone(input_ids=batch, labels=batch).loss.reshape(1, 1)).sum()
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val", self.backbone(input_ids=batch, labels=batch).loss, sync_dist=True)

    test_step = validation_step

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append(self.trainer.callback_metrics.get("loss", torch.zeros(())).item())

    def on_validation_end(self) -> None:
        self.seen.append(self.trainer.callback_metrics["val"].item())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr, eps=1e-4)

    def on_train_end(self) -> None:
        self.weights = whole(self)


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in module.named_parameters()
    }


class Run:
    """Trainers and data of one side: plain Lightning, or one rank of a layout."""

    def __init__(self, rank: int, world: int, layout: dict[str, Any] | None, folder: str) -> None:
        self.layout, self.world, self.folder = layout, world, folder
        self.data = 1 if layout is None else layout.get("data_parallel_size", 1)
        self.data_rank = rank // (world // self.data)

    def trainer(self, **arguments: Any) -> Trainer:
        defaults = {
            "accelerator": "cpu",
            "devices": self.world,
            "precision": "64-true",
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            "default_root_dir": self.folder,
            "strategy": "auto" if self.layout is None else NPUTensorParallelStrategy(**self.layout),
        }
        return Trainer(**{**defaults, **arguments})

    def loader(self, batches: int = BATCHES, seed: int = 0) -> DataLoader:
        # A global batch has the same rows on any number of data ranks.
        rows = torch.randint(
            0, 128, (batches, self.data, ROWS // self.data, 7), generator=torch.Generator().manual_seed(seed)
        )
        return DataLoader(rows[:, self.data_rank].flatten(0, 1), batch_size=ROWS // self.data)

    def fit(self, module: Foreign, trainer: Trainer, **arguments: Any) -> None:
        trainer.fit(module, self.loader(), self.loader(seed=1), **arguments)


class Unfreezes(callbacks.BaseFinetuning):
    """Trains the first layer, with experts and without, from the second epoch on."""

    def freeze_before_training(self, module: Any) -> None:
        self.freeze(module.backbone.model.layers)

    def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.backbone.model.layers, optimizer, lr=5e-3)


def finetuning(run: Run) -> Foreign:
    module = Foreign()
    run.fit(module, run.trainer(max_epochs=3, callbacks=[Unfreezes()]))
    return module


def finetuning_resumed(run: Run) -> Foreign:
    first, path = run.trainer(max_epochs=2, callbacks=[Unfreezes()]), f"{run.folder}/finetuned.ckpt"
    run.fit(Foreign(), first)
    first.save_checkpoint(path)
    module = Foreign()
    run.fit(module, run.trainer(max_epochs=3, callbacks=[Unfreezes()]), ckpt_path=path)
    return module


class HeadOnly(Foreign):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.head.parameters(), lr=self.lr, eps=1e-4)


def backbone(run: Run) -> Foreign:
    module = HeadOnly()
    run.fit(module, run.trainer(max_epochs=3, callbacks=[callbacks.BackboneFinetuning(1, lambda epoch: 1.5)]))
    return module


def learning_rate(run: Run) -> Foreign:
    module, trainer = Foreign(), run.trainer()
    found = Tuner(trainer).lr_find(module, run.loader(8), num_training=6, min_lr=1e-4, max_lr=1e-1)
    module.seen += [*found.results["lr"], *found.results["loss"], module.lr]
    run.fit(module, run.trainer())
    return module


def learning_rate_callback(run: Run) -> Foreign:
    module = Foreign()
    trainer = run.trainer(
        max_epochs=2, callbacks=[callbacks.LearningRateFinder(num_training_steps=6, min_lr=1e-4, max_lr=1e-1)]
    )
    trainer.fit(module, run.loader(8))
    return module


class Scheduled(Foreign):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.3)]


def scheduler_added(run: Run, first: Any = Foreign, then: Any = Scheduled) -> Foreign:
    before, path = run.trainer(max_epochs=1), f"{run.folder}/plain.ckpt"
    run.fit(first(), before)
    before.save_checkpoint(path)
    module = then()
    run.fit(module, run.trainer(max_epochs=3), ckpt_path=path)
    return module


class OtherAdam(Foreign):
    """Another optimizer at the resume: settings and states are the checkpoint's, as torch has it."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1.0, amsgrad=True, weight_decay=0.5)


class NoOptimizer(Foreign):
    def configure_optimizers(self) -> None:
        return None


def no_optimizer(run: Run) -> Foreign:
    trainer, path = run.trainer(max_epochs=1), f"{run.folder}/none.ckpt"
    module = NoOptimizer()
    run.fit(module, trainer)
    trainer.save_checkpoint(path)
    module = NoOptimizer()
    run.fit(module, run.trainer(max_epochs=2), ckpt_path=path)
    return module


def averaged(run: Run) -> Foreign:
    module = Foreign()
    run.fit(module, run.trainer(max_epochs=3, callbacks=[callbacks.StochasticWeightAveraging(1e-2, 1, 1)]))
    return module


def exponentially_averaged(run: Run) -> Foreign:
    module = Foreign()
    run.fit(module, run.trainer(max_epochs=3, callbacks=[callbacks.EMAWeightAveraging(decay=0.5)]))
    return module


def accumulating(run: Run) -> Foreign:
    module = Scheduled()
    trainer = run.trainer(
        max_epochs=3,
        gradient_clip_val=0.5,
        callbacks=[
            callbacks.GradientAccumulationScheduler({1: 2}),
            callbacks.LambdaCallback(
                on_train_epoch_start=lambda trainer, module: module.seen.append(trainer.current_epoch)
            ),
        ],
    )
    run.fit(module, trainer)
    return module


class Manual(Foreign):
    """Two optimizers by hand, one toggled at a time, and a part that is frozen by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, 0.5)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        inner = torch.optim.AdamW(self.backbone.parameters(), lr=1e-2, eps=1e-4)
        outer = torch.optim.SGD(self.head.parameters(), lr=1e-2)
        return [inner, outer], [torch.optim.lr_scheduler.StepLR(one, 1, gamma=0.5) for one in (inner, outer)]


def manual(run: Run) -> Foreign:
    module = Manual()
    run.fit(module, run.trainer())
    return module


class Frozen(Foreign):
    def on_fit_start(self) -> None:
        for parameter in self.backbone.model.layers[0].parameters():
            parameter.requires_grad = False
        self.backbone.lm_head.requires_grad_(False)


def frozen(run: Run) -> Foreign:
    module = Frozen()
    run.fit(module, run.trainer())
    return module


class WholeFrozen(Foreign):
    """`freeze` and `unfreeze` of Lightning's own, around a validation."""

    def on_train_epoch_start(self) -> None:
        self.freeze()
        self.unfreeze()
        self.train()


def unfrozen(run: Run) -> Foreign:
    module = WholeFrozen()
    run.fit(module, run.trainer())
    return module


def fit_again(run: Run) -> Foreign:
    module, trainer = Foreign(), run.trainer(max_epochs=1)
    run.fit(module, trainer)
    module.seen += trainer.validate(module, run.loader(seed=1), verbose=False)[0].values()
    trainer.fit_loop.max_epochs = 3
    run.fit(module, trainer)
    module.seen += trainer.test(module, run.loader(seed=2), verbose=False)[0].values()
    return module


def fit_again_by_steps(run: Run) -> Foreign:
    module, trainer = Foreign(), run.trainer(max_epochs=-1, max_steps=3)
    run.fit(module, trainer)
    trainer.fit_loop.epoch_loop.max_steps = 6
    run.fit(module, trainer)
    module.seen.append(trainer.global_step)
    return module


def two_trainers(run: Run) -> Foreign:
    module = Foreign()
    module.seen += run.trainer().validate(module, run.loader(seed=1), verbose=False)[0].values()
    for _ in range(2):
        run.fit(module, run.trainer(max_epochs=1))
    module.seen += run.trainer().test(module, run.loader(seed=1), verbose=False)[0].values()
    return module


def limited(run: Run) -> Foreign:
    module = Foreign()
    trainer = run.trainer(
        limit_train_batches=1, limit_val_batches=1, max_epochs=3, check_val_every_n_epoch=2, inference_mode=False
    )
    run.fit(module, trainer)
    return module


def overfitted(run: Run) -> Foreign:
    module = Foreign()
    run.fit(module, run.trainer(overfit_batches=1, max_epochs=2, profiler="simple"))
    return module


def fast(run: Run) -> Foreign:
    module = Foreign()
    run.fit(module, run.trainer(fast_dev_run=2, max_epochs=None))
    return module


HABITS: dict[str, Any] = {
    "finetuning": finetuning,
    "finetuning resumed": finetuning_resumed,
    "backbone": backbone,
    "learning rate": learning_rate,
    "learning rate callback": learning_rate_callback,
    "scheduler added": scheduler_added,
    "scheduler removed": partial(scheduler_added, first=Scheduled, then=Foreign),
    "other settings": partial(scheduler_added, then=OtherAdam),
    "no optimizer": no_optimizer,
    "swa": averaged,
    "ema": exponentially_averaged,
    "accumulating": accumulating,
    "manual": manual,
    "frozen": frozen,
    "unfrozen": unfrozen,
    "fit again": fit_again,
    "fit again by steps": fit_again_by_steps,
    "two trainers": two_trainers,
    "limited": limited,
    "overfitted": overfitted,
    "fast": fast,
}


def train(rank: int, world: int, name: str, layout: dict[str, Any] | None, folder: str) -> Any:
    warnings.filterwarnings("ignore")
    seed_everything(3, verbose=False)
    with float64_reference() if layout is None else nullcontext():
        module = HABITS[name](Run(rank, world, layout, folder))
    return module.weights, module.seen


# Averages of the weights are refused over data ranks, and there the finder looks at rank 0's loss, as under DDP.
CASES = [
    (layout, name)
    for layout in LAYOUTS
    for name in HABITS
    if layout == "tensor" or name not in ("swa", "ema", "learning rate", "learning rate callback")
]


@pytest.mark.parametrize(("layout", "name"), CASES, ids=["-".join(case) for case in CASES])
def test_a_habit_gives_the_numbers_of_plain_lightning(on_ranks: Any, tmp_path: Path, name: str, layout: str) -> None:
    ((weights, seen),) = on_ranks(train, 1, name, None, str(tmp_path / "plain"), backend=None)
    world, settings = LAYOUTS[layout]
    assert weights and seen
    for found, also_seen in on_ranks(train, world, name, settings, str(tmp_path / "ranks"), backend=None, timeout=120):
        assert also_seen == pytest.approx(seen, rel=1e-10)
        for parameter, expected in weights.items():
            assert relative_difference(found[parameter], expected) < 1e-10, parameter
