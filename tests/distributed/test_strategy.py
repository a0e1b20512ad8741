"""The strategy under a real Trainer on two ranks.

Catches what a stock strategy gets wrong silently: weights that differ between ranks or are wiped, a sum that
counts tensor ranks, a mixed precision that computes in float32, a checkpoint that does not come back, a process
group that outlives its trainer.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchmetrics
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import DeepseekV2ForCausalLM

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.errors import CheckpointError, ConfigError, ConversionError
from lightning_npu_tp.tools.testing.models import tiny_deepseek_v2_config

WORLD = 2


def config(**overrides: Any):
    return tiny_deepseek_v2_config(num_hidden_layers=2, initializer_range=0.02, **overrides)


class Module(LightningModule):
    """A module that knows nothing of sharding."""

    def __init__(self, source: str = "meta", optimizer: str = "adamw", extra: bool = False, **options: Any) -> None:
        super().__init__()
        if source == "meta":
            with torch.device("meta"):
                self.network = DeepseekV2ForCausalLM(config())
        elif source == "random":
            self.network = DeepseekV2ForCausalLM(config())
        else:
            self.network = DeepseekV2ForCausalLM.from_pretrained(source)
        self.head = nn.Linear(64, 1) if extra else None
        self.seen = torchmetrics.SumMetric()
        self.optimizer, self.options, self.losses = optimizer, options, []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.network(input_ids=batch, labels=batch).loss
        if self.head is not None:
            loss = loss + self.head(self.network.model(input_ids=batch).last_hidden_state).pow(2).mean()
        self.losses.append(loss.detach().double().item())
        self.log("sum", torch.tensor(1.0), sync_dist=True, reduce_fx="sum", on_step=False, on_epoch=True)
        self.seen.update(len(batch))
        self.log("seen", self.seen, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.network(input_ids=batch, labels=batch).loss, sync_dist=True)

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.network(input_ids=batch).logits.argmax(-1)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1)
        return torch.optim.AdamW(self.parameters(), lr=3e-3, **self.options)


def data(rows: int = 8) -> DataLoader:
    """Two sentences in turn, so that a few steps learn something."""
    sentences = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(7))
    return DataLoader(sentences.repeat(rows // 2, 1), batch_size=2)


def trainer(strategy: Any = None, **arguments: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": WORLD,
        "strategy": strategy or NPUTensorParallelStrategy(init_seed=0),
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**defaults, **arguments})


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, gathered; inside a trainer call."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in module.named_parameters()
    }


def weights_of(source: str, rank: int) -> dict[str, Any]:
    torch.manual_seed(rank)
    module = Module(source)
    before = {} if source == "meta" else {n: p.detach().clone() for n, p in module.named_parameters()}
    run = trainer(max_steps=0)
    run.fit(module, data())
    with run.strategy.process_group():
        return {"before": before, "after": whole(module)}


def sources(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    return {source: weights_of(source, rank) for source in ("meta", "random", folder)}


def test_weights_that_exist_are_kept_and_rank_zeros_are_everyones(on_ranks: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    saved = DeepseekV2ForCausalLM(config())
    saved.save_pretrained(tmp_path)
    first, second = on_ranks(sources, WORLD, str(tmp_path), backend=None)
    for source in first:
        assert all(torch.equal(value, second[source]["after"][n]) for n, value in first[source]["after"].items())
    assert not torch.equal(
        first["random"]["before"]["network.lm_head.weight"], second["random"]["before"]["network.lm_head.weight"]
    ), "the ranks must start apart for this test to mean anything"
    for source in ("random", str(tmp_path)):
        assert all(torch.equal(value, first[source]["after"][n]) for n, value in first[source]["before"].items())
    for name, parameter in saved.named_parameters():
        assert torch.equal(first[str(tmp_path)]["after"][f"network.{name}"], parameter)


def metrics_and_decisions(rank: int, world_size: int) -> dict[str, Any]:
    run, module = trainer(), Module()
    decisions = {}

    def decide() -> None:
        strategy = run.strategy
        decisions["any"] = strategy.reduce_boolean_decision(rank == 1, all=False)
        decisions["all"] = strategy.reduce_boolean_decision(rank == 1, all=True)
        decisions["gathered"] = strategy.all_gather(torch.ones(3)).shape
        decisions["broadcast"] = strategy.broadcast({"rank": rank}, src=1)
        decisions["mesh"] = module.device_mesh.mesh_dim_names
        with pytest.raises(ConfigError, match="reduce_op='median' is not known"):
            strategy.reduce(torch.ones(1), reduce_op="median")

    module.on_train_epoch_start = decide
    run.fit(module, data())
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    predictions = run.predict(module, data())
    return {
        **logged,
        "predictions": [tuple(p.shape) for p in predictions],
        **decisions,
    }


def test_sums_and_gathers_count_each_sample_once(on_ranks: Any) -> None:
    for result in on_ranks(metrics_and_decisions, WORLD, backend=None):
        assert result["sum"] == 4, "four batches, not one per rank"
        assert result["seen"] == 8, "torchmetrics too"
        assert result["any"] is True and result["all"] is False
        assert result["gathered"] == (1, 3)
        assert result["broadcast"] == {"rank": 1}
        assert result["mesh"] == ("data_parallel", "tensor_parallel")
        assert result["predictions"] == [(2, 12)] * 4


PRECISIONS = {
    "32-true": (torch.float32, torch.float32),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "64-true": (torch.float64, torch.float64),
}


def precisions(rank: int, world_size: int) -> dict[str, Any]:
    results = {}
    for name in PRECISIONS:
        for how in ("npu_tp", NPUTensorParallelStrategy()):
            torch.manual_seed(0)
            module = Module("random")
            computed = set()

            def record(layer: nn.Module, inputs: Any, output: torch.Tensor, computed: set = computed) -> None:
                computed.add(output.dtype)

            # The string "cpu" would make Lightning take bf16-mixed for 16-mixed before anybody is asked.
            run = trainer(how, precision=name, accelerator=CPUAccelerator(), gradient_clip_val=1.0)
            module.on_fit_start = lambda module=module, record=record: [
                layer.register_forward_hook(record)
                for layer in module.modules()
                if type(layer).__name__ == "ShardedLinear"
            ]
            run.fit(module, data(16))
            dtypes = {parameter.dtype for parameter in module.network.parameters()}
            results[name, isinstance(how, str)] = (dtypes, computed, module.losses)
    return results


def test_every_precision_computes_in_what_it_says_and_learns(on_ranks: Any) -> None:
    first, second = on_ranks(precisions, WORLD, backend=None, timeout=120)
    assert len(first) == 2 * len(PRECISIONS)
    for (name, by_string), (dtypes, computed, losses) in first.items():
        parameter_dtype, compute_dtype = PRECISIONS[name]
        assert dtypes == {parameter_dtype}, (name, by_string)
        assert computed == {compute_dtype}, (name, by_string)
        assert losses == second[name, by_string][2]
        assert losses[-1] < losses[0], (name, losses)


def lifecycle(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    run, module = trainer(), Module()
    run.fit(module, data())
    result["open after fit"] = dist.is_initialized()
    with pytest.raises(ConfigError, match="process_group"):
        module.network(input_ids=torch.zeros(1, 3, dtype=torch.long))
    with run.strategy.process_group():
        result["logits"] = module.network(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.shape
    run.save_checkpoint(f"{folder}/after_fit")
    before = [loss for loss in module.losses]
    other = trainer()
    result["val"] = other.validate(module, data(), verbose=False)[0]["val_loss"]
    run.fit_loop.max_epochs = 2
    run.fit(module, data())
    result["more"] = len(module.losses) - len(before)
    # The same batch, before anything was learnt and after the first fit.
    result["loss"] = (before[0], module.losses[len(before)])
    fresh = Module()
    result["restored"] = trainer().validate(fresh, data(), ckpt_path=f"{folder}/after_fit", verbose=False)[0][
        "val_loss"
    ]
    result["open at the end"] = dist.is_initialized()
    return result


class KeepGroups(Callback):
    """Weak references to the groups of a fit."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        meshes = trainer.strategy.meshes
        groups = (dist.group.WORLD, meshes.tensor_group, meshes.expert_group, meshes.data_group)
        self.kept = [weakref.ref(group) for group in groups]


def groups_kept(rank: int, world_size: int, data_size: int) -> tuple[int, int, tuple[int, ...]]:
    """How many groups there were, how many outlive their fit though the model does too, and what that then computes."""
    keep, module = KeepGroups(), Module()
    run = trainer(NPUTensorParallelStrategy(data_parallel_size=data_size), callbacks=[keep])
    run.fit(module, data(16))
    gc.collect()
    outlive = sum(group() is not None for group in keep.kept)
    with run.strategy.process_group():
        logits = module.network(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits
    return len(keep.kept), outlive, tuple(logits.shape)


@pytest.mark.parametrize("data_size", [1, 2])
def test_no_connection_of_a_fit_outlives_it(on_ranks: Any, data_size: int) -> None:
    assert on_ranks(groups_kept, WORLD, data_size, backend=None) == [(4, 0, (1, 3, 128))] * WORLD


def test_the_process_group_lives_as_long_as_a_trainer_call(on_ranks: Any, tmp_path: Path) -> None:
    for result in on_ranks(lifecycle, WORLD, str(tmp_path), backend=None):
        assert not result["open after fit"] and not result["open at the end"]
        assert result["logits"] == (1, 3, 128)
        assert result["restored"] == pytest.approx(result["val"], rel=1e-6)
        assert result["more"] == 4
        assert result["loss"][1] < result["loss"][0]


def mixed_parameters(rank: int, world_size: int) -> dict[str, Any]:
    torch.manual_seed(rank)
    result = {}
    for options in ({}, {"foreach": True}, {"fused": True}):
        module = Module(extra=True, **options)
        run = trainer(gradient_clip_val=0.1)
        if options:
            with pytest.raises(ConfigError, match=f"{next(iter(options))}=True in parameter group 0 of AdamW"):
                run.fit(module, data())
        else:
            run.fit(module, data())
            assert run.optimizers[0].param_groups[0]["foreach"] is False
            result["head"] = module.head.weight.detach()
            result["losses"] = module.losses
    for options in ({}, {"foreach": True}, {"foreach": False}, {"fused": False}):
        module = Module(**options)
        run = trainer(gradient_clip_val=0.1)
        run.fit(module, data())
        group = run.optimizers[0].param_groups[0]
        result[str(options)] = (group["fused"], group["foreach"], module.losses)
    return result


def test_layers_of_ones_own_are_shared_clipped_and_updated(on_ranks: Any) -> None:
    first, second = on_ranks(mixed_parameters, WORLD, backend=None)
    assert torch.equal(first["head"], second["head"]), "built with another seed on each rank"
    assert first["losses"] == second["losses"]
    fused, *others = (first[str(o)] for o in ({}, {"foreach": True}, {"foreach": False}, {"fused": False}))
    assert fused[:2] == (True, None), "the fast one where nobody chose"
    assert [other[:2] for other in others] == [(None, True), (None, False), (False, None)]
    assert all(other[2] == pytest.approx(fused[2], rel=1e-4) for other in others)


def refusals(rank: int, world_size: int) -> None:
    class Nothing(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ConfigError, match="2 processes were started.*trainer.devices=4"):
        trainer(devices=4)
    with pytest.raises(
        ConversionError, match=r"Nothing holds no model that can be sharded \(it has Linear\).*deepseek_v2"
    ):
        trainer().fit(Nothing(), DataLoader(torch.randn(4, 2)))
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=3 does not divide the 2 devices.*\[1, 2\]"):
        trainer(NPUTensorParallelStrategy(tensor_parallel_size=3))
    with pytest.raises(ConfigError, match="data_parallel_size=3"):
        trainer(NPUTensorParallelStrategy(data_parallel_size=3))
    with pytest.raises(ConfigError, match="timeout_s=0"):
        NPUTensorParallelStrategy(timeout_s=0)
    odd = Module()
    with torch.device("meta"):
        odd.network = DeepseekV2ForCausalLM(config(num_attention_heads=1))
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=2 cannot split the 1 heads.*\[1\]"):
        trainer().fit(odd, data())
    run = trainer()
    with pytest.raises(ConfigError, match="meshes exist only while"):
        _ = run.strategy.meshes
    with pytest.raises(CheckpointError, match="storage_options"):
        run.strategy.save_checkpoint({}, "x", storage_options={})


def test_what_cannot_be_done_is_refused_with_a_repair(on_ranks: Any) -> None:
    on_ranks(refusals, WORLD, backend=None)


def anomaly(rank: int, world_size: int) -> list[float]:
    module = Module()
    trainer(detect_anomaly=True).fit(module, data())
    return module.losses


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_detection_works(on_ranks: Any) -> None:
    first, second = on_ranks(anomaly, WORLD, backend=None)
    assert len(first) == 4 and first == second


class Calls(Callback):
    """What happens between the first batch and the last."""

    def __init__(self) -> None:
        self.broadcasts = 0
        self.plain = dist.broadcast

    def on_train_batch_start(self, *_: Any) -> None:
        dist.broadcast = self.broadcast

    def broadcast(self, *arguments: Any, **options: Any) -> Any:
        self.broadcasts += 1
        return self.plain(*arguments, **options)

    def on_train_epoch_end(self, *_: Any) -> None:
        dist.broadcast = self.plain


def steps(rank: int, world_size: int) -> dict[str, Any]:
    calls, bound = Calls(), []
    strategy = NPUTensorParallelStrategy(accelerator=CPUAccelerator())
    run = trainer(strategy, accelerator="auto", callbacks=[calls], max_epochs=2)
    setup_device = run.accelerator.setup_device
    run.accelerator.setup_device = lambda device: (bound.append(device), setup_device(device))
    run.fit(Module(), data())
    run.fit_loop.max_epochs = 3
    steps_before = run.global_step
    run.fit(Module(), data())
    return {"broadcasts": calls.broadcasts, "bound": len(bound), "steps": (steps_before, run.global_step)}


def test_a_training_step_broadcasts_nothing_and_a_trainer_call_binds_the_device_once(on_ranks: Any) -> None:
    for result in on_ranks(steps, WORLD, backend=None):
        assert result["broadcasts"] == 0, "Lightning asks all ranks for signals before each batch"
        assert result["bound"] == 2, "once per fit"
        assert result["steps"] == (8, 12), "the second fit goes on counting"
