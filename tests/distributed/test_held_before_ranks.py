"""What a user made or set before conversion goes on with the sharded model: optimizers, hooks, attributes, lists.

Catches an optimizer of `__init__` that steps tensors which no forward reads (losses repeat, without an error), hooks
that no longer run, and a list of parameters that stays with the old ones. Losses and weights are compared with plain
Lightning's, in float64.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.tools.testing.models import reference_model, tiny_config, tiny_deepseek_v2_config
from lightning_npu_tp.tools.testing.reference import float64_reference, relative_difference
from lightning_npu_tp.tools.testing.sharded import whole

ROWS, LENGTH, STEPS = 12, 9, 3
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor": (2, {}),
    "shard": (2, {"data_parallel_size": 2}),
    "replicate": (2, {"data_parallel_size": 2, "data_parallel": "replicate"}),
    "both": (4, {"data_parallel_size": 2, "expert_parallel_size": 4}),
}


def scaled(factor: float, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * factor


def halve(parameter: Tensor) -> None:
    parameter.grad.mul_(0.5)


class Early(LightningModule):
    """Makes everything in `__init__` that others make in configure_optimizers."""

    def __init__(self, *, on_parameters: bool) -> None:
        super().__init__()
        network = reference_model(tiny_deepseek_v2_config(num_hidden_layers=2)).train()
        self.network, self.losses, self.calls = network, [], 0
        network.model.norm.weight.no_decay = True
        network.lm_head.weight.rate = 1e-3
        layer = network.model.layers[1]
        layer.mlp.name_of_mine = "mixture"
        network.model.embed_tokens.register_forward_hook(partial(scaled, 1.5))
        layer.self_attn.o_proj.register_forward_hook(partial(scaled, 0.5))
        layer.mlp.shared_experts.register_forward_hook(partial(scaled, 3.0))
        layer.input_layernorm.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
        layer.mlp.register_full_backward_hook(self.count)
        gone = network.model.norm.register_forward_hook(partial(scaled, 100.0))
        if on_parameters:
            network.lm_head.weight.register_hook(lambda gradient: gradient * 2)
        network.model.embed_tokens.weight.register_post_accumulate_grad_hook(halve)
        self.listed, self.named = list(network.parameters()), dict(network.named_parameters())
        self.chosen, self.of_mlp = set(network.parameters()), layer.mlp
        self.first = lambda parameters=self.listed, weight=network.lm_head.weight: (parameters[0], weight)
        self.nested = (network.lm_head.weight, partial(torch.mul, network.lm_head.weight))
        self.optimizer = self.make()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.5**step)
        gone.remove()

    def make(self) -> torch.optim.Optimizer:
        plain = [p for p in self.network.parameters() if hasattr(p, "no_decay")]
        slow = [p for p in self.network.parameters() if hasattr(p, "rate")]
        rest = [p for p in self.network.parameters() if not vars(p).keys() & {"no_decay", "rate"}]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": slow, "lr": slow[0].rate}, {"params": rest}]
        return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)

    def count(self, *_: Any) -> None:
        self.calls += 1

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.network(input_ids=batch, labels=batch).loss
        self.losses.append(self.trainer.strategy.reduce(loss.detach(), reduce_op="mean").item())
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        now = dict(self.network.named_parameters())
        assert all(a is b for a, b in zip(self.listed, now.values(), strict=True))
        assert self.named.keys() == now.keys() and all(self.named[name] is now[name] for name in now)
        assert self.chosen == set(now.values())
        assert self.first()[0] is self.listed[0] and self.first()[1] is now["lm_head.weight"]
        assert self.nested[0] is self.nested[1].args[0] is now["lm_head.weight"]
        assert self.of_mlp is self.network.model.layers[1].mlp and self.of_mlp.name_of_mine == "mixture"
        found = [name for name, p in now.items() if hasattr(p, "no_decay")]
        assert found == ["model.norm.weight"], found

    def configure_optimizers(self) -> Any:
        return [self.optimizer], [{"scheduler": self.scheduler, "interval": "step"}]


class TwoByHand(Early):
    """Two optimizers, stepped by hand."""

    def __init__(self, *, on_parameters: bool) -> None:
        super().__init__(on_parameters=on_parameters)
        self.automatic_optimization = False
        half = len(self.listed) // 2
        self.both = [torch.optim.SGD(part, lr=0.1, momentum=0.9) for part in (self.listed[:half], self.listed[half:])]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return self.both


def fit(rank: int, world_size: int, kind: type[Early], layout: str | None, on_parameters: bool) -> dict[str, Any]:
    settings = LAYOUTS[layout][1] if layout else {}
    data = settings.get("data_parallel_size", 1)
    rows = torch.randint(0, 128, (ROWS, LENGTH), generator=torch.Generator().manual_seed(7))
    batch = ROWS // STEPS // data
    mine = rows.view(-1, data, batch, LENGTH)[:, rank // (world_size // data)].reshape(-1, LENGTH)
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=NPUTensorParallelStrategy(**settings) if layout else "auto",
        precision="64-true",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    with nullcontext() if layout else float64_reference():
        module = kind(on_parameters=on_parameters)
        trainer.fit(module, DataLoader(mine, batch_size=batch))
    with trainer.strategy.process_group() if layout else nullcontext():
        parameters = {name: whole(p).detach().clone() for name, p in module.network.named_parameters()}
    return {"losses": module.losses, "parameters": parameters, "calls": module.calls}


@pytest.mark.parametrize("kind", [Early, TwoByHand])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_made_before_conversion_trains_as_in_one_process(on_ranks: Any, layout: str, kind: type) -> None:
    world, settings = LAYOUTS[layout]
    # A hook of autograd on a parameter is refused over data ranks, below.
    on_parameters = "data_parallel_size" not in settings
    (wanted,) = on_ranks(fit, 1, kind, None, on_parameters, backend=None)
    assert wanted["losses"][-1] != wanted["losses"][0] and wanted["calls"] == STEPS
    for found in on_ranks(fit, world, kind, layout, on_parameters, backend=None, timeout=120):
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-10) and found["calls"] == STEPS
        for name, expected in wanted["parameters"].items():
            assert relative_difference(found["parameters"][name], expected) < 1e-10, name


class Frozen(Early):
    def __init__(self, *, on_parameters: bool) -> None:
        super().__init__(on_parameters=on_parameters)
        self.frozen = frozenset(self.listed)


class Stated(Early):
    def __init__(self, *, on_parameters: bool) -> None:
        super().__init__(on_parameters=on_parameters)
        self.network(input_ids=torch.ones(1, 5, dtype=torch.int64)).logits.sum().backward()
        self.optimizer.step()


def refusals(rank: int, world_size: int) -> None:
    def refused(kind: type[Early], layout: str, message: str, *, on_parameters: bool = False) -> None:
        with pytest.raises(ConversionError, match=message):
            fit(rank, world_size, kind, layout, on_parameters)

    refused(Frozen, "tensor", "A frozenset holds .* of before the model was sharded, and cannot be changed")
    refused(Stated, "tensor", "holds whole tensors for .* from before the model was sharded.*configure_optimizers")
    refused(Early, "shard", "lm_head.weight has a hook of register_hook.*data_parallel_size", on_parameters=True)


def test_what_cannot_follow_is_refused_by_name(on_ranks: Any) -> None:
    on_ranks(refusals, 2, backend=None)


def modules_and_names(rank: int, world_size: int) -> None:
    """A forward that a user has set on a module which is replaced."""
    for family in ("deepseek_v2", "qwen2_moe"):
        module = Early(on_parameters=False)
        module.network = reference_model(tiny_config(family))
        attention = module.network.model.layers[0].self_attn
        attention.forward = lambda hidden_states, **_: (hidden_states, None)
        trainer = Trainer(
            accelerator="cpu", devices=world_size, strategy="npu_tp", logger=False, enable_checkpointing=False
        )
        with pytest.raises(ConversionError, match=r"model.layers.0.self_attn .* has a forward of its own, set on"):
            trainer.fit(module, DataLoader(torch.ones(2, 4, dtype=torch.int64)))


def test_a_forward_that_would_not_run_is_refused(on_ranks: Any) -> None:
    on_ranks(modules_and_names, 2, backend=None)
