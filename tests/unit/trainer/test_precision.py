"""Precision plugins as the strategy gets them.

Catches: autocast for the wrong device (the matmuls then run in float32, with only a warning), a
gradient scaler that has switched itself off, a precision that the device lacks, and clipping that
stays Lightning's.
"""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import precision as stock

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.trainer import precision as ours
from lightning_npu_tp.trainer.precision import AgreedGradScaler, ShardedClipping, precision_dtype, rebuild_precision

# What the Trainer builds on a machine without CUDA for an accelerator that it does not know.
SWITCHED_OFF = "ignore:torch.cuda.amp.GradScaler is enabled, but CUDA is not available:UserWarning"


def plugin(name, device="cuda"):
    if name == "32-true":
        return stock.Precision()
    if name == "64-true":
        return stock.DoublePrecision()
    return stock.MixedPrecision(name, device) if name.endswith("mixed") else stock.HalfPrecision(name)


DTYPES = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
    "64-true": torch.float64,
}


@pytest.mark.filterwarnings(SWITCHED_OFF)
@pytest.mark.parametrize("name", DTYPES)
def test_a_rebuilt_plugin_means_the_same_and_clips_shards(name):
    given = plugin(name)
    rebuilt = rebuild_precision(given, "cpu")
    assert rebuilt.precision == name
    assert isinstance(rebuilt, ShardedClipping) and isinstance(rebuilt, type(given))
    assert precision_dtype(given) == precision_dtype(rebuilt) == DTYPES[name]
    assert rebuild_precision(rebuilt, "cpu") is rebuilt
    # A checkpoint keeps the plugin's state under this name.
    assert type(rebuilt).__qualname__ == type(given).__qualname__
    with rebuilt.tensor_init_context():
        assert torch.empty(1).dtype == DTYPES[name]


@pytest.mark.filterwarnings(SWITCHED_OFF)
@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_mixed_precision_is_moved_to_the_root_device(device):
    for name in ("bf16-mixed", "16-mixed"):
        rebuilt = rebuild_precision(plugin(name, "cuda"), device)
        assert rebuilt.device == device
    assert isinstance(rebuilt.scaler, AgreedGradScaler)
    assert rebuilt.scaler.is_enabled() and rebuilt.scaler._device == device
    again = rebuild_precision(rebuilt, "cpu")
    assert again.device == "cpu" and again.scaler._device == "cpu"


def test_the_matmuls_of_rebuilt_mixed_precision_run_in_sixteen_bits():
    given = plugin("bf16-mixed", "cuda")
    weight = torch.ones(2, 2)
    with rebuild_precision(given, "cpu").forward_context():
        assert (weight @ weight).dtype == torch.bfloat16
    with rebuild_precision(stock.MixedPrecision("16-mixed", "cpu"), "cpu").forward_context():
        assert (weight @ weight).dtype == torch.float16


def test_the_settings_of_a_users_scaler_are_kept():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=7)
    rebuilt = rebuild_precision(stock.MixedPrecision("16-mixed", "cpu", scaler), "cpu").scaler
    assert isinstance(rebuilt, AgreedGradScaler)
    settings = (rebuilt.get_scale(), rebuilt.get_growth_factor(), rebuilt.get_backoff_factor())
    assert settings == (8.0, 3.0, 0.25)
    assert rebuilt.get_growth_interval() == 7


@pytest.mark.parametrize("given", [stock.DoublePrecision(), ours.DoublePrecision()])
def test_a_precision_that_the_device_lacks_is_refused_with_those_that_work(given):
    with pytest.raises(ConfigError, match=r"trainer.precision=64-true does not work on npu(.|\n)*'bf16-true'"):
        rebuild_precision(given, "npu")


def test_a_mixed_plugin_made_by_hand_has_the_agreed_scaler():
    assert isinstance(ours.MixedPrecision("16-mixed", "cpu").scaler, AgreedGradScaler)
    assert ours.MixedPrecision("bf16-mixed", "cpu").scaler is None


class Stranger(stock.MixedPrecision):
    pass


class Prepared(ShardedClipping, stock.MixedPrecision):
    pass


def test_a_plugin_of_the_users_own_is_kept_if_it_clips_shards_and_refused_otherwise():
    prepared = Prepared("bf16-mixed", "cpu")
    assert rebuild_precision(prepared, "cpu") is prepared
    with pytest.raises(ConfigError, match=r"Stranger is not made for sharded(.|\n)*ShardedClipping"):
        rebuild_precision(Stranger("bf16-mixed", "cpu"), "cpu")


def test_clipping_by_the_plugin_is_clipping_over_shards():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    for given in (stock.Precision(), stock.MixedPrecision("bf16-mixed", "cpu")):
        rebuilt = rebuild_precision(given, "cpu")
        weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
        rebuilt.clip_grad_by_norm(optimizer, 1.0)
        torch.testing.assert_close(weights[1].grad, torch.tensor([0.0, 0.8]))
        rebuilt.clip_grad_by_value(optimizer, 0.5)
        torch.testing.assert_close(weights[1].grad, torch.tensor([0.0, 0.5]))


def test_the_scaler_refuses_half_precision_parameters():
    scaler = AgreedGradScaler("cpu")
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))
    weight.grad = torch.ones_like(weight)
    scaler.scale(torch.ones(()))
    with pytest.raises(ConfigError, match="16-true or bf16-true"):
        scaler.unscale_(torch.optim.SGD([weight], lr=1.0))


def test_the_scaler_is_torchs_on_one_process():
    def train(scaler):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        scales = []
        for factor in (1.0, float("inf"), 1.0, 1.0):
            optimizer.zero_grad()
            scaler.scale(layer(torch.ones(1, 3)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return layer.weight.detach(), scales

    (weight, scales), (expected, expected_scales) = train(AgreedGradScaler("cpu")), train(torch.amp.GradScaler("cpu"))
    assert torch.equal(weight, expected) and scales == expected_scales
    assert scales[1] == scales[0] / 2


def fit(given, clip, algorithm):
    """The weights after two steps of a plain single-device trainer."""
    torch.manual_seed(0)
    model = BoringModel()
    trainer = Trainer(
        accelerator=CPUAccelerator(), devices=1, max_steps=2, logger=False, enable_checkpointing=False, plugins=[given],
        enable_progress_bar=False, enable_model_summary=False, limit_train_batches=2, limit_val_batches=0,
        gradient_clip_val=clip, gradient_clip_algorithm=algorithm,
    )  # fmt: skip
    trainer.fit(model)
    return model.layer.weight.detach()


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize(
    "make", [stock.Precision, lambda: stock.MixedPrecision("16-mixed", "cpu")], ids=["32-true", "16-mixed"]
)
def test_a_lightning_trainer_clips_through_the_rebuilt_plugin_as_through_its_own(make, algorithm):
    expected = fit(make(), 0.01, algorithm)
    weight = fit(rebuild_precision(make(), "cpu"), 0.01, algorithm)
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-8)
    assert not torch.equal(weight, fit(make(), None, algorithm))
