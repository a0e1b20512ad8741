"""The strategy over data ranks, under a real Trainer.

Catches gradients summed where they should be averaged, layers of the user's own that drift apart, samples of an
uneven validation set that count twice or never, a hang where data ranks have different numbers of batches, process
groups that FSDP keeps from the trainer call before, and checkpoints that only their own layout can read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import DeepseekV2ForCausalLM

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.callbacks import ExpertLoadMonitor, LossFreeBalance, NonFiniteGuard
from lightning_npu_tp.callbacks.nonfinite import NonFiniteError
from lightning_npu_tp.errors import ConfigError, DataError
from lightning_npu_tp.parallel.tensor_region import local
from lightning_npu_tp.tools.testing.models import tiny_deepseek_v2_config
from lightning_npu_tp.tools.testing.reference import relative_difference
from lightning_npu_tp.tools.testing.sharded import whole

ROWS, LENGTH = 8, 12


class Module(LightningModule):
    """A model and a plain layer of the user's own; nothing in it knows of ranks."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        with torch.device("meta"):
            self.network = DeepseekV2ForCausalLM(tiny_deepseek_v2_config(num_hidden_layers=2, **config))
        torch.manual_seed(3)
        self.head = nn.Linear(64, 1)
        self.losses: list[float] = []
        self.seen: list[int] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.network(input_ids=batch, labels=batch).loss
        loss = loss + self.head(self.network.model(input_ids=batch).last_hidden_state).pow(2).mean()
        self.losses.append(self.trainer.strategy.reduce(loss.detach()).item())
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        loss = self.network(input_ids=batch, labels=batch).loss
        self.seen.append(len(batch))
        self.log("val_loss", loss, sync_dist=True, on_epoch=True, batch_size=len(batch))

    def on_after_backward(self) -> None:
        layout = self.trainer.strategy.layout
        if layout.data > 1 and layout.expert == 1 and self.trainer.fit_loop._should_accumulate():
            sharded = [p for p in self.network.parameters() if p.grad is not None]
            assert not sharded, "a micro-batch that is not the last reduced its gradients"

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if isinstance(self.network, FSDPModule):
            (group,) = self.network._get_fsdp_state()._fsdp_param_groups
            now = self.trainer.strategy.meshes.data_group
            assert group.mesh_info.shard_process_group is now, "a process group of the trainer call before"
        return self.network(input_ids=batch).logits.argmax(-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def rows(number: int = ROWS) -> torch.Tensor:
    return torch.randint(0, 128, (number, LENGTH), generator=torch.Generator().manual_seed(7))


def trainer(**arguments: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "precision": "64-true",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "gradient_clip_val": 0.5,
    }
    return Trainer(**{**defaults, **arguments})


def batches(batch: int, total: torch.Tensor | None = None) -> DataLoader:
    return DataLoader(rows() if total is None else total, batch_size=batch)


def strategy(**settings: Any) -> NPUTensorParallelStrategy:
    return NPUTensorParallelStrategy(init_seed=0, **settings)


def ordered(rank: int, ranks: int, batch: int) -> DataLoader:
    # Rank r's micro-batch b are rows of global batch b: the same rows at the same step on any number of ranks.
    data = rows().view(-1, ranks, batch, LENGTH)[:, rank].reshape(-1, LENGTH)
    return DataLoader(data, batch_size=batch)


def fit(rank: int, world_size: int, settings: dict[str, Any], accumulate: int) -> dict[str, Any]:
    module, layout = Module(), strategy(**settings)
    data = settings.get("data_parallel_size", 1)
    run = trainer(
        devices=world_size, strategy=layout, accumulate_grad_batches=accumulate, use_distributed_sampler=False
    )
    tensor = world_size // data
    run.fit(module, ordered(rank // tensor, data, 4 // data))
    with layout.process_group():
        parameters = {name: whole(p).detach().clone() for name, p in module.named_parameters()}
    return {"losses": module.losses, "parameters": parameters}


@pytest.fixture(scope="module")
def alone(on_ranks: Any) -> dict[int, dict[str, Any]]:
    """What one process computes, by number of accumulated micro-batches."""
    return {accumulate: on_ranks(fit, 1, {}, accumulate, backend=None)[0] for accumulate in (1, 2)}


SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "experts divided": (2, {"data_parallel_size": 2, "expert_parallel_size": 2}),
    "experts whole": (2, {"data_parallel_size": 2}),
    "replicate": (2, {"data_parallel_size": 2, "data_parallel": "replicate"}),
    "four ranks, slices": (4, {"data_parallel_size": 2, "expert_parallel_size": 4, "sequence_parallel": True}),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_data_ranks_train_what_one_process_trains(on_ranks: Any, alone: Any, name: str, accumulate: int) -> None:
    world, settings = SETTINGS[name]
    wanted = alone[accumulate]
    for result in on_ranks(fit, world, settings, accumulate, backend=None, timeout=120):
        for step, (actual, expected) in enumerate(zip(result["losses"], wanted["losses"], strict=True)):
            assert actual == pytest.approx(expected, rel=1e-10), f"step {step}"
        for parameter, expected in wanted["parameters"].items():
            assert relative_difference(result["parameters"][parameter], expected) < 1e-10, parameter


def evaluate(rank: int, world_size: int, number: int, batch: int, settings: dict[str, Any]) -> dict[str, Any]:
    module, layout = Module(), strategy(**settings)
    run = trainer(devices=world_size, strategy=layout)
    loss = run.validate(module, batches(batch, rows(number)), verbose=False)[0]["val_loss"]
    predicted = run.predict(module, batches(batch, rows(number)))
    return {"loss": loss, "seen": module.seen, "predicted": torch.cat(predicted), "batches": len(predicted)}


@pytest.mark.parametrize(("number", "batch"), [(5, 2), (7, 3), (9, 4), (3, 2)])
def test_an_uneven_validation_set_counts_each_sample_once(on_ranks: Any, number: int, batch: int) -> None:
    settings = {"data_parallel_size": 2, "expert_parallel_size": 2}
    (wanted,) = on_ranks(evaluate, 1, number, batch, {}, backend=None)
    results = on_ranks(evaluate, 2, number, batch, settings, backend=None, timeout=90)
    assert sum(sum(result["seen"]) for result in results) == number
    assert len({len(result["seen"]) for result in results}) == 1, "as many batches on each rank"
    assert len({result["batches"] for result in results}) == 1
    for result in results:
        assert result["loss"] == pytest.approx(wanted["loss"], rel=1e-10)
    found = torch.cat([result["predicted"] for result in results])
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, wanted["predicted"].tolist()))


def undividable(rank: int, world_size: int) -> str:
    run = trainer(devices=world_size, strategy=strategy(data_parallel_size=2))
    try:
        run.validate(Module(), batches(1, rows(5)), verbose=False)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_set_that_cannot_be_divided_says_what_would_work(on_ranks: Any) -> None:
    for message in on_ranks(undividable, 2, backend=None):
        assert "5 samples in batches of 1" in message and "2 data ranks" in message and "batch size of 2" in message


def save(rank: int, world_size: int, path: str, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    module, layout = Module(), strategy(**settings)
    run = trainer(devices=world_size, strategy=layout, max_epochs=1)
    run.fit(module, batches(2))
    run.save_checkpoint(path)
    with layout.process_group():
        return {name: whole(p).detach().clone() for name, p in module.named_parameters()}


def resume(rank: int, world_size: int, path: str, settings: dict[str, Any]) -> dict[str, Any]:
    module, layout = Module(), strategy(**settings)
    run = trainer(devices=world_size, strategy=layout, max_epochs=1)
    run.fit(module, batches(2), ckpt_path=path)
    with layout.process_group():
        state = {
            index: {key: whole(value).clone() for key, value in values.items()}
            for index, values in enumerate(run.optimizers[0].state.values())
        }
        return {"parameters": {n: whole(p).detach().clone() for n, p in module.named_parameters()}, "optimizer": state}


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tensor": (2, {}),
    "data": (2, {"data_parallel_size": 2, "expert_parallel_size": 2}),
    "both": (4, {"data_parallel_size": 2, "expert_parallel_size": 4}),
    "replicas": (4, {"data_parallel_size": 2}),
}


@pytest.mark.parametrize(
    ("source", "target"), [("data", "tensor"), ("both", "one"), ("tensor", "both"), ("replicas", "data")]
)
def test_any_layout_resumes_from_any_other(on_ranks: Any, tmp_path: Path, source: str, target: str) -> None:
    path = str(tmp_path / "saved.ckpt")
    saved = on_ranks(save, LAYOUTS[source][0], path, LAYOUTS[source][1], backend=None, timeout=90)[0]
    resumed = on_ranks(resume, LAYOUTS[target][0], path, LAYOUTS[target][1], backend=None, timeout=90)
    itself = on_ranks(resume, LAYOUTS[source][0], path, LAYOUTS[source][1], backend=None, timeout=90)[0]
    for result in resumed:
        for name, wanted in saved.items():
            assert torch.equal(result["parameters"][name], wanted), name
        for index, values in itself["optimizer"].items():
            for key, wanted in values.items():
                assert torch.equal(result["optimizer"][index][key], wanted), f"{key} of parameter {index}"


def averaging(rank: int, world_size: int) -> str:
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    run = trainer(
        devices=world_size, strategy=strategy(data_parallel_size=2), callbacks=[StochasticWeightAveraging(1e-2)]
    )
    try:
        run.fit(Module(), batches(2))
    except ConfigError as error:
        return str(error)
    return ""


def test_weight_averaging_over_data_ranks_is_refused(on_ranks: Any) -> None:
    for message in on_ranks(averaging, 2, backend=None):
        assert "StochasticWeightAveraging" in message and "data_parallel_size=1" in message


def balanced(rank: int, world_size: int, settings: dict[str, Any], folder: str) -> dict[str, Any]:
    from lightning.pytorch.loggers import CSVLogger

    module, layout = Module(selection_bias=True), strategy(**settings)
    data = settings.get("data_parallel_size", 1)
    run = trainer(
        devices=world_size,
        strategy=layout,
        accumulate_grad_batches=2,
        use_distributed_sampler=False,
        logger=CSVLogger(folder, name="", version="run"),
        log_every_n_steps=1,
        callbacks=[LossFreeBalance(rate=0.5), ExpertLoadMonitor(every_n_steps=1)],
    )
    run.fit(module, ordered(rank // (world_size // data), data, 4 // data))
    gate = module.network.model.layers[1].mlp.gate
    saved = any(name.endswith("e_score_correction_bias") for name in module.state_dict())
    return {"bias": gate.e_score_correction_bias.clone(), "saved": saved}


def test_the_bias_that_balances_does_not_depend_on_the_layout(on_ranks: Any, tmp_path: Path) -> None:
    (wanted,) = on_ranks(balanced, 1, {}, str(tmp_path / "one"), backend=None)
    assert wanted["bias"].abs().max() > 0.4 and wanted["saved"]
    settings = {"data_parallel_size": 2, "expert_parallel_size": 4, "sequence_parallel": True, "recompute": "block"}
    for name, world, layout in (("four", 4, settings), ("tensor", 2, {}), ("slices", 2, {"sequence_parallel": True})):
        for result in on_ranks(balanced, world, layout, str(tmp_path / name), backend=None, timeout=90):
            assert torch.equal(result["bias"], wanted["bias"]), name
        loads = {
            folder: [row for row in (tmp_path / folder / "run" / "metrics.csv").read_text().splitlines()]
            for folder in ("one", name)
        }
        columns = {folder: lines[0].split(",") for folder, lines in loads.items()}
        for quantity in ("expert_load/dropped", "expert_load/max_over_mean", "expert_load/entropy"):
            found, expected = (
                [float(value) for line in loads[f][1:] if (value := line.split(",")[columns[f].index(quantity)])]
                for f in (name, "one")
            )
            assert found == pytest.approx(expected) and len(found) == 2, (name, quantity)
            assert quantity != "expert_load/dropped" or found == [0.0, 0.0]


class BadGradient(Module):
    """Rank 1 has a gradient that is not a number, in the second of three steps."""

    def on_after_backward(self) -> None:
        if self.trainer.global_step == 1 and self.trainer.global_rank == 1:
            for name, parameter in self.named_parameters():
                if name.endswith("layers.1.mlp.experts.down_proj"):
                    parameter.grad.to_local().view(-1)[0] = float("nan")


def guarded(rank: int, world_size: int, settings: dict[str, Any], action: Any) -> dict[str, Any]:
    module, layout = BadGradient(), strategy(**settings)
    kept: list[dict[str, torch.Tensor]] = []

    class Keep(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            kept.append({name: local(p.detach()).clone() for name, p in module.named_parameters()})

    run = trainer(
        devices=world_size,
        strategy=layout,
        max_steps=3,
        max_epochs=None,
        use_distributed_sampler=False,
        callbacks=[NonFiniteGuard(action=action), Keep()],
    )
    message = ""
    try:
        run.fit(module, DataLoader(rows(12), batch_size=4))
    except NonFiniteError as error:
        message = str(error)
    same = [all(torch.equal(a[n], b[n]) for n in a) for a, b in zip(kept, kept[1:], strict=False)]
    return {"message": message, "same": same}


@pytest.mark.parametrize("action", ["skip", "stop"])
def test_one_ranks_bad_gradient_refuses_the_step_on_all(on_ranks: Any, action: str) -> None:
    settings = {"data_parallel_size": 2, "expert_parallel_size": 2}
    for result in on_ranks(guarded, 2, settings, action, backend=None):
        if action == "skip":
            assert result["same"] == [True, False], "the second step changed nothing, the third did"
        else:
            assert "experts.down_proj" in result["message"] and "rank 1" in result["message"], result["message"]


def disagreeing(rank: int, world_size: int, settings: dict[str, Any]) -> str:
    run = trainer(devices=world_size, strategy=strategy(**settings), gradient_clip_val=0.5 + rank)
    try:
        run.fit(Module(), batches(2))
    except ConfigError as error:
        return str(error)
    return ""


def test_a_rank_with_another_setting_is_told_before_training(on_ranks: Any) -> None:
    for message in on_ranks(disagreeing, 2, {"data_parallel_size": 2}, backend=None):
        assert "gradient_clip_val" in message and "1.5 on rank 1" in message and "0.5 on rank 0" in message


def uneven(rank: int, world_size: int) -> str:
    layout = strategy(data_parallel_size=2)
    run = trainer(devices=world_size, strategy=layout, use_distributed_sampler=False)
    try:
        run.fit(Module(), batches(2, rows(4 + 2 * rank)))
    except DataError as error:
        return str(error)
    return ""


def test_data_ranks_with_other_numbers_of_batches_are_refused(on_ranks: Any) -> None:
    for message in on_ranks(uneven, 2, backend=None):
        assert "rank 1" in message and "3" in message and "2" in message
