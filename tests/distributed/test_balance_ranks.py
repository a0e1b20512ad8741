"""Catches balance that is right on one process only: a loss formed from a rank's own slice of the sequence, a slice's
gradient that is counted twice or not at all, experts balanced by one rank's tokens, biases that drift apart.
"""

from __future__ import annotations

import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_npu_tp.callbacks import ExpertLoadMonitor, LossFreeBalance
from lightning_npu_tp.models.moe.balance import batch_balance_loss, router_z_loss, sequence_balance_loss
from lightning_npu_tp.models.moe.bias import update_bias
from lightning_npu_tp.models.moe.router import TopKRouter
from lightning_npu_tp.parallel.collectives import reduce_from_group
from lightning_npu_tp.tools.testing.reference import assert_close_relative

TOLERANCE = 1e-12
NUM_SEQUENCES, LENGTH, NUM_EXPERTS, NUM_PICKS = 3, 7, 6, 2
# How many of the 7 positions rank 0 has; rank 1 has the rest.
CUTS = {"even or nearly": 4, "uneven": 1, "an empty slice": 0}


def z_loss(scores_BSE: Tensor, experts_BSK: Tensor, mask_BS: Tensor | None, **settings: Any) -> Tensor:
    mask_T = None if mask_BS is None else mask_BS.flatten()
    return router_z_loss(scores_BSE.flatten(0, 1), mask_T, **settings)


LOSSES = {"sequence": sequence_balance_loss, "batch": batch_balance_loss, "z": z_loss}


def routed(masked: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(7)
    scores = torch.randn(NUM_SEQUENCES, LENGTH, NUM_EXPERTS, dtype=torch.float64).softmax(-1)
    mask = None
    if masked:
        mask = torch.ones(NUM_SEQUENCES, LENGTH, dtype=torch.bool)
        # One sequence ends inside rank 0's slice, one counts nowhere.
        mask[0, 3:] = mask[1] = False
    return scores, scores.topk(NUM_PICKS, dim=-1).indices, mask


def on_a_slice(rank: int, world_size: int, name: str, cut: int, masked: bool) -> tuple[Tensor, Tensor]:
    scores, experts, mask = routed(masked)
    mine = slice(0, cut) if rank == 0 else slice(cut, None)
    local = scores[:, mine].clone().requires_grad_()
    reduce = partial(reduce_from_group, group=dist.group.WORLD)
    loss = LOSSES[name](local, experts[:, mine], None if mask is None else mask[:, mine], reduce=reduce)
    loss.backward()
    return loss.detach(), local.grad


@pytest.mark.parametrize("masked", [False, True], ids=["all count", "masked"])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_slices_of_the_sequence_give_the_whole_loss_and_each_its_part_of_the_gradient(
    on_ranks: Any, name: str, cut: int, masked: bool
) -> None:
    scores, experts, mask = routed(masked)
    scores.requires_grad_()
    expected = LOSSES[name](scores, experts, mask)
    expected.backward()
    (loss, first), (other_loss, second) = on_ranks(on_a_slice, 2, name, cut, masked)
    assert first.shape[1] == cut
    for each in (loss, other_loss):
        assert_close_relative(each, expected, TOLERANCE, f"{name} loss")
    assert_close_relative(torch.cat([first, second], dim=1), scores.grad, TOLERANCE, f"{name} gradient")


def steps_on_ranks(rank: int, world_size: int, counts: Tensor) -> tuple[list[Tensor], int]:
    """counts: [steps, ranks, layers, E]."""
    blocks = []
    for _ in range(counts.shape[2]):
        gate = TopKRouter(hidden_size=4, num_experts=counts.shape[3], top_k=1, selection_bias=True)
        pending = torch.zeros(counts.shape[3], dtype=torch.int64)
        blocks.append(SimpleNamespace(gate=gate, pending_tokens_per_expert=pending))
    calls = 0

    def reduce(tensor: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        dist.all_reduce(tensor)
        return tensor

    for step in counts[:, rank]:
        for block, counts_E in zip(blocks, step, strict=True):
            block.pending_tokens_per_expert += counts_E
        update_bias(blocks, 0.25, reduce=reduce)
    return [block.gate.e_score_correction_bias for block in blocks], calls


def test_the_bias_follows_the_tokens_of_all_ranks_with_one_collective_a_step(on_ranks: Any) -> None:
    # Rank 0 alone would favour expert 0, rank 1 alone expert 1; together expert 2 is the one left out.
    first = [[[0, 3, 1, 0], [1, 1, 1, 1]], [[4, 0, 0, 0], [1, 1, 1, 1]]]
    second = [[[0, 0, 0, 0], [0, 0, 0, 4]], [[0, 0, 0, 0], [0, 2, 2, 0]]]
    counts = torch.tensor([first, second])
    (biases, calls), (others, other_calls) = on_ranks(steps_on_ranks, 2, counts)
    assert calls == other_calls == 2
    # Loads [4, 3, 1, 0] against 2, then nothing; even ones, then [0, 2, 2, 4] against 2.
    assert biases[0].tolist() == [-0.25, -0.25, 0.25, 0.25]
    assert biases[1].tolist() == [0.25, 0.0, 0.0, -0.25]
    assert all(torch.equal(a, b) for a, b in zip(biases, others, strict=True))


class Layer(nn.Module):
    """As much of a mixture layer as the callbacks look at."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = TopKRouter(hidden_size=8, num_experts=4, top_k=2, selection_bias=True)
        self.register_buffer("pending_tokens_per_expert", torch.zeros(4, dtype=torch.int64), persistent=False)
        self.tokens_per_expert: Tensor | None = None

    def forward(self, x_TD: Tensor) -> Tensor:
        routing = self.gate(x_TD)
        self.tokens_per_expert = routing.experts_TK.flatten().bincount(minlength=4)
        self.pending_tokens_per_expert += self.tokens_per_expert
        return routing.weights_TK.sum(1, keepdim=True) * x_TD


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = batch["x"].flatten(0, 1)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Shared(DDPStrategy):
    """As a strategy of ours whose ranks all see the same batches, and of their tokens a slice each."""

    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        return tensor

    def token_groups(self) -> list[dist.ProcessGroup]:
        return [dist.group.WORLD]


class Repeated(Shared):
    """As a strategy of ours whose ranks all see the same tokens."""

    def token_groups(self) -> list[dist.ProcessGroup]:
        return []


def tokens_of(rank: int) -> Tensor:
    """[batches, sequences, length, hidden] of one rank."""
    return torch.randn(3, 2, 6, 8, generator=torch.Generator().manual_seed(rank))


def watched_run(rank: int, world_size: int, folder: str, kind: str) -> dict[str, Any]:
    strategy = {"data": DDPStrategy, "slices": Shared, "repeated": Repeated}[kind](process_group_backend="gloo")
    monitor = ExpertLoadMonitor(folder, every_n_steps=2, key="input_ids")
    tokens = tokens_of(0 if kind == "repeated" else rank)
    # With slices the batch is the whole one, and the model sees a part of it; a rank's part is 2 sequences of 6.
    whole = torch.zeros(2, 12 if kind == "slices" else 6)
    batches = [{"x": x, "input_ids": whole} for x in tokens]
    model, reports = Model(), []
    monitor._write = lambda path, load, step: reports.append((path.name, load["tokens"]))  # type: ignore[method-assign]
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
        callbacks=[LossFreeBalance(0.25), monitor],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, DataLoader(batches, batch_size=None))
    return {
        "bias": torch.stack([layer.gate.e_score_correction_bias for layer in model.layers]),
        "dropped": float(trainer.callback_metrics["expert_load/dropped"]),
        "reports": reports,
    }


@pytest.mark.parametrize("kind", ["data", "slices", "repeated"])
def test_the_callbacks_count_every_token_of_all_ranks_once(on_ranks: Any, tmp_path: Any, kind: str) -> None:
    tokens = tokens_of(0) if kind == "repeated" else torch.cat([tokens_of(0), tokens_of(1)], dim=1)
    model, steps = Model(), []
    for batch in tokens:
        model.training_step({"x": batch}, 0)
        steps.append(torch.stack([layer.tokens_per_expert for layer in model.layers]))
        for layer, loads in zip(model.layers, steps[-1].double(), strict=True):
            layer.gate.e_score_correction_bias += 0.25 * (loads.mean() - loads).sign()
    first, second = on_ranks(watched_run, 2, str(tmp_path), kind, backend=None)
    biases = torch.stack([layer.gate.e_score_correction_bias for layer in model.layers])
    assert biases.any() and torch.equal(first["bias"], biases) and torch.equal(second["bias"], biases)
    assert first["dropped"] == second["dropped"] == 0
    # Rank 0 alone draws: one interval of two steps, the third begins another.
    ((name, counts),) = first["reports"]
    assert not second["reports"] and name == "expert_load_step00000002.png"
    assert torch.equal(counts, steps[0] + steps[1])
