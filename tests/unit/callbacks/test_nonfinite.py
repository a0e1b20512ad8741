"""Catches: a refused step that still moves weights, averages or weight decay; a NaN found only after clipping has
spread it; a name that is always the embedding; a guard that fights the gradient scaler.
"""

from __future__ import annotations

import copy
import logging

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_npu_tp.callbacks.nonfinite import NonFiniteError, NonFiniteGuard
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.trainer.precision import MixedPrecision

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*treespec")


class Three(L.LightningModule):
    """Three layers; at the given micro-batches the loss, or one layer's gradient, is not finite."""

    def __init__(self, *, bad_loss=(), bad_gradient=(), value=float("nan")) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(3)))
        self.bad_loss, self.bad_gradient, self.value = bad_loss, bad_gradient, value
        self.states = []

    def training_step(self, batch, batch_idx):
        hidden = self.layers[1](self.layers[0](batch[0]))
        if batch_idx in self.bad_gradient:
            hidden.register_hook(lambda gradient: gradient * self.value)
        loss = self.layers[2](hidden).square().mean()
        return loss * self.value if batch_idx in self.bad_loss else loss

    def on_train_batch_end(self, *_):
        self.states.append(copy.deepcopy((self.state_dict(), self.optimizers().optimizer.state_dict())))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


def fit(module, guard, **settings):
    data = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(2)).flatten(0, 1)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[guard],
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0, **settings,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(data), batch_size=2))
    return trainer


def assert_same(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["bad_loss", "bad_gradient"])
def test_a_skipped_step_leaves_weights_and_optimizer_state_bit_for_bit(where, value, caplog) -> None:
    module, guard = Three(**{where: (3,)}, value=value), NonFiniteGuard(action="skip")
    with caplog.at_level(logging.WARNING, logger="lightning_npu_tp"):
        trainer = fit(module, guard)
    before, at, after = module.states[2], module.states[3], module.states[4]
    assert_same(at, before)
    assert not torch.equal(after[0]["layers.0.weight"], at[0]["layers.0.weight"])
    assert all(torch.isfinite(tensor).all() for tensor in module.state_dict().values())
    assert guard.state_dict() == {"skipped": 1, "consecutive": 0}
    assert trainer.callback_metrics["train/skipped_steps"] == 1 and "step 4" in caplog.text


def test_stop_raises_with_step_rank_and_layer_and_the_weights_untouched() -> None:
    module = Three(bad_gradient=(2,))
    with pytest.raises(NonFiniteError) as caught:
        fit(module, NonFiniteGuard())
    # Of layers 0 and 1 the one nearer to the loss, where it began.
    message = str(caught.value)
    assert "The gradient of layers.1.bias (backward reached it first; 3 more follow)" in message
    assert "optimizer step 3, on rank 0" in message and "The loss" not in message
    assert_same(module.state_dict(), module.states[1][0])


def test_one_bad_micro_batch_drops_its_whole_window_and_no_other() -> None:
    module, guard = Three(bad_loss=(2,)), NonFiniteGuard(action="skip")
    fit(module, guard, accumulate_grad_batches=2)
    weights = [state[0] for state in module.states]
    assert_same(weights[3], weights[1])
    assert not torch.equal(weights[5]["layers.0.weight"], weights[3]["layers.0.weight"])
    assert guard.skipped == 1


def test_too_many_refused_steps_in_a_row_end_the_run() -> None:
    guard = NonFiniteGuard(action="skip", max_consecutive=2)
    fit(Three(bad_loss=(0, 2, 4)), guard)
    assert guard.skipped == 3
    guard = NonFiniteGuard(action="skip", max_consecutive=2)
    with pytest.raises(NonFiniteError, match="2 optimizer steps in a row"):
        fit(Three(bad_loss=(0, 2, 3)), guard)


def test_infinite_gradients_are_left_to_the_gradient_scaler_and_a_bad_loss_is_not() -> None:
    def half(init_scale: float) -> MixedPrecision:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))

    # So large a scale overflows in the first steps, which is how a scaler finds its scale.
    plugin = half(2.0**127)
    fit(Three(bad_gradient=(1,), value=float("inf")), NonFiniteGuard(), plugins=plugin)
    assert plugin.scaler.get_scale() < 2.0**127
    with pytest.raises(NonFiniteError, match="The loss of optimizer step 3 is not finite on rank 0"):
        fit(Three(bad_loss=(2,)), NonFiniteGuard(), plugins=half(1.0))


def test_counts_are_kept_in_checkpoints() -> None:
    guard, other = NonFiniteGuard(action="skip"), NonFiniteGuard(action="skip")
    guard.skipped, guard.consecutive = 4, 2
    other.load_state_dict(guard.state_dict())
    assert (other.skipped, other.consecutive) == (4, 2)


@pytest.mark.parametrize("settings", [{"action": "ignore"}, {"max_consecutive": 0}])
def test_settings_that_cannot_work_are_refused(settings) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        NonFiniteGuard(**settings)
