"""Catches a bias that moves the wrong way, too often, for tokens that were not trained on, for those of the last
step again, or for a part of an accumulation window only, and one that a checkpoint forgets.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_npu_tp.callbacks import LossFreeBalance
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.models.moe.bias import biased_blocks, clear_pending, update_bias
from lightning_npu_tp.models.moe.router import TopKRouter
from lightning_npu_tp.tools.testing.operators import CountOperators

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec",
    "ignore:.*treespec",
    "ignore:.*callbacks used to create the checkpoint",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
)

NUM_EXPERTS, RATE = 4, 0.125


class Block(nn.Module):
    """As much of a mixture layer as balance looks at."""

    def __init__(self, selection_bias: bool = True) -> None:
        super().__init__()
        self.gate = TopKRouter(hidden_size=8, num_experts=NUM_EXPERTS, top_k=2, selection_bias=selection_bias)
        self.register_buffer("pending_tokens_per_expert", torch.zeros(NUM_EXPERTS, dtype=torch.int64), persistent=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        routing = self.gate(x_TD)
        if self.training and torch.is_grad_enabled():
            self.pending_tokens_per_expert += routing.experts_TK.flatten().bincount(minlength=NUM_EXPERTS)
        return routing.weights_TK.sum(1, keepdim=True) * x_TD


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.ModuleList([Block(), Block()])
        for block in self.blocks:
            nn.init.normal_(block.gate.weight)

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()

    def validation_step(self, x: Tensor, batch_idx: int) -> None:
        self.training_step(x, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # The weights stay, so that a test can route the same tokens again.
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def biases(self) -> Tensor:
        return torch.stack([block.gate.e_score_correction_bias for block in self.blocks])


class Watch(L.Callback):
    """The biases after each batch, and Lightning's count of steps."""

    def __init__(self) -> None:
        self.biases: list[Tensor] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Model, *args: Any) -> None:
        self.biases.append(pl_module.biases().clone())
        self.steps.append(trainer.global_step)


def batches(number: int = 5) -> list[Tensor]:
    return list(torch.randn(number, 6, 8, generator=torch.Generator().manual_seed(2)))


def fit(model: Model, callbacks: list[L.Callback], ckpt_path: str | None = None, **settings: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks, **{"max_epochs": 1, "enable_checkpointing": False, **settings},
    )  # fmt: skip
    loader = DataLoader(batches(), batch_size=None)
    trainer.fit(model, loader, DataLoader(batches(3), batch_size=None), ckpt_path=ckpt_path)
    return trainer


def replay(windows: list[list[int]]) -> list[Tensor]:
    """The biases after each window of batches, by the definition, one expert at a time."""
    model, after = Model(), []
    for window in windows:
        loads = torch.zeros(2, NUM_EXPERTS, dtype=torch.int64)
        for index in window:
            x = batches()[index]
            for layer, block in enumerate(model.blocks):
                routing = block.gate(x)
                for expert in routing.experts_TK.flatten().tolist():
                    loads[layer, expert] += 1
                x = routing.weights_TK.sum(1, keepdim=True) * x
        for layer, block in enumerate(model.blocks):
            mean = loads[layer].sum().item() / NUM_EXPERTS
            for expert in range(NUM_EXPERTS):
                difference = mean - loads[layer, expert].item()
                with torch.no_grad():
                    block.gate.e_score_correction_bias[expert] += RATE * ((difference > 0) - (difference < 0))
        after.append(model.biases().clone())
    return after


# --- the rule ----------------------------------------------------------------------------------


def pending(*counts: list[int]) -> list[Any]:
    gates = [SimpleNamespace(e_score_correction_bias=torch.zeros(len(row))) for row in counts]
    return [
        SimpleNamespace(gate=gate, pending_tokens_per_expert=torch.tensor(row))
        for gate, row in zip(gates, counts, strict=True)
    ]


def test_the_idle_are_favoured_the_busy_put_off_and_the_counts_forgotten() -> None:
    blocks = pending([0, 2, 3, 3], [5, 5, 5, 5], [0, 0, 0, 0])
    update_bias(blocks, RATE)
    assert [block.gate.e_score_correction_bias.tolist() for block in blocks] == [
        [RATE, 0.0, -RATE, -RATE],
        [0.0] * 4,
        [0.0] * 4,
    ]
    assert not any(block.pending_tokens_per_expert.any() for block in blocks)
    update_bias(blocks, RATE)
    assert blocks[0].gate.e_score_correction_bias.tolist() == [RATE, 0.0, -RATE, -RATE]


def test_counts_that_no_float_can_tell_apart_are_compared_exactly() -> None:
    # One expert is one token above the mean; in float32, and in float64 after a division, they are equal.
    even = 2**55
    (block,) = pending([even, even + 1, even, even - 1])
    update_bias([block], RATE)
    assert block.gate.e_score_correction_bias.tolist() == [0.0, -RATE, 0.0, RATE]


def test_an_update_reads_nothing_on_the_host_and_no_blocks_are_no_trouble() -> None:
    blocks = pending([0, 2, 3, 3], [1, 1, 1, 5])
    with CountOperators() as operators:
        update_bias(blocks, RATE)
        clear_pending(blocks)
    assert not operators.found() and blocks[1].gate.e_score_correction_bias.any()
    update_bias([], RATE)
    clear_pending([])


def test_a_block_that_has_not_run_stays_as_it_is() -> None:
    blocks = pending([0, 2, 3, 3], [1, 1, 1, 5])
    blocks[0].pending_tokens_per_expert = None
    clear_pending(blocks[:1])
    update_bias(blocks, RATE)
    assert [block.gate.e_score_correction_bias.tolist() for block in blocks] == [[0.0] * 4, [RATE, RATE, RATE, -RATE]]


def test_layers_of_different_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[2, 3\] experts"):
        update_bias(pending([1, 2], [1, 2, 3]), RATE)


def test_only_blocks_with_a_bias_are_found() -> None:
    model = nn.ModuleDict({"with": Block(), "without": Block(selection_bias=False), "other": nn.Linear(1, 1)})
    assert list(biased_blocks(model)) == ["with"]


# --- the moment --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "accumulate, windows",
    [(1, [[0], [1], [2], [3], [4]]), (2, [[0, 1], [2, 3], [4]]), (3, [[0, 1, 2], [3, 4]])],
)
def test_the_bias_moves_once_per_optimizer_step_by_the_whole_windows_tokens(
    accumulate: int, windows: list[list[int]]
) -> None:
    model, watch = Model(), Watch()
    fit(model, [LossFreeBalance(RATE), watch], accumulate_grad_batches=accumulate)
    expected = replay(windows)
    assert watch.steps[-1] == len(windows)
    for biases, step in zip(watch.biases, watch.steps, strict=True):
        assert torch.equal(biases, expected[step - 1] if step else torch.zeros(2, NUM_EXPERTS))
    assert not torch.equal(expected[0], expected[-1])


def test_validation_and_a_warm_up_count_nothing() -> None:
    class WarmsUp(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Model) -> None:
            pl_module.training_step(batches()[4], 0)

    model, watch = Model(), Watch()
    fit(model, [LossFreeBalance(RATE), WarmsUp(), watch], val_check_interval=1, accumulate_grad_batches=2)
    assert torch.equal(watch.biases[-1], replay([[0, 1], [2, 3], [4]])[-1])


def test_a_window_that_was_broken_off_is_forgotten() -> None:
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 1 and args[-1] == 2:
                raise RuntimeError("stop")

    model = Model()
    balance = LossFreeBalance(RATE)
    with pytest.raises(RuntimeError, match="stop"):
        fit(model, [balance, Stops()], accumulate_grad_batches=2)
    assert model.blocks[0].pending_tokens_per_expert.any()
    watch = Watch()
    fit(model, [balance, watch], accumulate_grad_batches=5)
    # A window of the first fit, then all five batches, and not the third one twice.
    assert torch.equal(watch.biases[-1], replay([[0, 1], [0, 1, 2, 3, 4]])[-1])


def test_a_window_is_whole_also_in_a_run_resumed_inside_an_epoch(tmp_path: Any) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    settings = {"accumulate_grad_batches": 2, "enable_checkpointing": True}
    fit(Model(), [LossFreeBalance(RATE), saving], **settings)
    model, watch = Model(), Watch()
    fit(model, [LossFreeBalance(RATE), watch], str(tmp_path / "step=1.ckpt"), accumulate_grad_batches=2)
    # The loader, which has no state of its own, begins anew.
    expected = replay([[0, 1], [0, 1], [2]])
    assert watch.steps == [1, 2, 3]
    assert all(torch.equal(*pair) for pair in zip(watch.biases, expected, strict=True))


@pytest.mark.parametrize("first", ["balance", "checkpoint"])
def test_a_checkpoint_holds_the_bias_after_its_step_and_a_resumed_run_goes_on_from_it(
    tmp_path: Any, first: str
) -> None:
    saving = [
        LossFreeBalance(RATE),
        ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1),
    ]
    fit(Model(), saving if first == "balance" else saving[::-1], enable_checkpointing=True)
    # The loader, which has no state of its own, begins anew.
    expected = replay([[0], [1], [0], [1], [2]])
    path = tmp_path / "step=2.ckpt"
    state = torch.load(path, weights_only=False)["state_dict"]
    assert torch.equal(state["blocks.0.gate.e_score_correction_bias"], expected[1][0])
    assert not any("pending" in name for name in state)
    model, watch = Model(), Watch()
    fit(model, [LossFreeBalance(RATE), watch], ckpt_path=str(path))
    assert watch.steps == [3, 4, 5] and torch.equal(watch.biases[-1], expected[-1])


def test_a_model_without_a_bias_and_a_rate_of_nothing_are_refused() -> None:
    model = Model()
    model.blocks = nn.ModuleList([Block(selection_bias=False)])
    with pytest.raises(ConfigError, match="Model has none.*noaux_tc"):
        fit(model, [LossFreeBalance(RATE)])
    with pytest.raises(ConfigError, match="rate=0"):
        LossFreeBalance(0)
