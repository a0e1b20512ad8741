"""Throughput on cards, with a stand-in for the card. Catches: a device that is not waited for, or in every step; a
window that holds validation, a checkpoint or the first batch; MFU of other tokens, devices or precisions than the
run's; work on the CPU that only cards need. Tokens per second as such: test_callbacks.py.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lightning_npu_tp.callbacks import TokensPerSecond, throughput
from lightning_npu_tp.estimates.flops import peak_flops, training_flops_per_token
from lightning_npu_tp.tools.testing.models import tiny_config


class Card:
    """torch.cuda as far as the callback uses it. Each wait takes `lag` seconds: the device is that far behind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str = "NVIDIA H100 80GB HBM3") -> None:
        self.now, self.lag, self.waits, self.name = 0.0, 0.0, 0, name
        monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(throughput, "torch_module", lambda device_type: self)

    def synchronize(self, device) -> None:
        self.waits += 1
        self.now += self.lag

    def memory_stats(self, device) -> dict[str, int]:
        return {"allocated_bytes.all.peak": 3 * 2**29}

    def get_device_name(self, device) -> str:
        return self.name


class Module:
    def __init__(self, device: str = "cuda", config: object = None) -> None:
        self.device = torch.device(device, 0)
        self.logged: list[tuple[str, float]] = []
        self._modules_ = (
            [SimpleNamespace(config={"a user's": "own"}), SimpleNamespace(config=config)] if config is not None else []
        )

    def modules(self):
        return self._modules_

    def log(self, name: str, value: float) -> None:
        self.logged.append((name, value))

    def values(self, name: str) -> list[float]:
        return [value for key, value in self.logged if key == name]


def trainer(precision: str = "bf16-mixed", world: int = 4, data: int = 2) -> SimpleNamespace:
    ranks = {"num_replicas": data, "rank": 0}
    return SimpleNamespace(distributed_sampler_kwargs=ranks, global_step=0, precision=precision, world_size=world)


BATCH = {"input_ids": torch.zeros(3, 32)}


def train(callback, trainer, module, card, batches: int, *, seconds: float = 2.0, accumulate: int = 1) -> None:
    for index in range(batches):
        card.now += seconds
        trainer.global_step += (index + 1) % accumulate == 0
        callback.on_train_batch_end(trainer, module, None, BATCH, index)


def test_the_device_is_waited_for_once_a_window_and_the_first_batch_is_left_out(monkeypatch) -> None:
    card, module, run = Card(monkeypatch), Module(), trainer()
    callback = TokensPerSecond(window=3)
    card.now += 1000
    train(callback, run, module, card, 7)
    assert card.waits == 3, "after the first batch, the fourth and the seventh"
    assert module.values("train/step_time_s") == [2.0, 2.0]
    assert module.values("train/peak_memory_gib") == [1.5, 1.5]


def test_time_that_the_device_is_behind_belongs_to_the_window(monkeypatch) -> None:
    card, module, run = Card(monkeypatch), Module(), trainer()
    callback = TokensPerSecond(window=3)
    train(callback, run, module, card, 1)
    card.lag = 6.0
    train(callback, run, module, card, 3)
    assert module.values("train/step_time_s") == [(3 * 2.0 + 6.0) / 3]


def test_a_step_is_an_optimizer_step(monkeypatch) -> None:
    card, module, run = Card(monkeypatch), Module(), trainer()
    callback = TokensPerSecond(window=4)
    train(callback, run, module, card, 1)
    train(callback, run, module, card, 4, accumulate=2)
    assert module.values("train/step_time_s") == [4.0]


def test_mfu_is_the_models_operations_over_the_peak_of_all_devices(monkeypatch) -> None:
    config = tiny_config("deepseek_v2")
    card, module, run = Card(monkeypatch), Module(config=config), trainer()
    callback = TokensPerSecond(window=2)
    train(callback, run, module, card, 3)
    # Three sequences on each of two data ranks, every two seconds, on four devices.
    rate = 2 * 3 * 32 / 2.0 * training_flops_per_token(config, 32)
    assert module.values("train/mfu") == [pytest.approx(rate / (4 * peak_flops(card.name)), rel=1e-12)]


@pytest.mark.parametrize(
    ("name", "precision", "config"),
    [
        ("Some New Card", "bf16-true", tiny_config("llama")),
        ("Ascend910B3", "32-true", tiny_config("llama")),
        ("Ascend910B3", "bf16-true", object()),
        ("Ascend910B3", "bf16-true", None),
    ],
)
def test_mfu_is_not_guessed(monkeypatch, name: str, precision: str, config: object) -> None:
    card, module = Card(monkeypatch, name), Module(config=config)
    train(TokensPerSecond(window=1), trainer(precision), module, card, 3)
    assert module.values("train/mfu") == [] and len(module.values("train/step_time_s")) == 2


def test_validation_and_checkpoints_are_no_part_of_a_step(monkeypatch) -> None:
    card, module, run = Card(monkeypatch), Module(), trainer()
    callback = TokensPerSecond(window=2)
    train(callback, run, module, card, 2)
    waits = card.waits
    card.lag = 5.0
    # What training had left on the device is done before the clock stops: it belongs to training.
    callback.on_validation_start(run, module)
    card.lag = 0.0
    card.now += 100
    callback.on_validation_end(run, module)
    assert card.waits == waits + 2
    train(callback, run, module, card, 1)
    assert module.values("train/step_time_s") == [(2 * 2.0 + 5.0) / 2]
    train(callback, run, module, card, 1)
    callback.on_save_checkpoint(run, module, {})
    card.now += 1000
    train(callback, run, module, card, 3)
    assert module.values("train/step_time_s")[1:] == [2.0]


def test_a_run_on_the_cpu_waits_for_nothing_and_logs_nothing_more(monkeypatch) -> None:
    card, module, run = Card(monkeypatch), Module("cpu", tiny_config("llama")), trainer()
    callback = TokensPerSecond(window=1)
    train(callback, run, module, card, 3)
    callback.on_validation_start(run, module)
    callback.on_validation_end(run, module)
    callback.on_train_end(run, module)
    assert card.waits == 0 and {name for name, _ in module.logged} == {"train/tokens_per_second"}


def test_the_peak_of_every_rank_is_told_at_the_end(monkeypatch, caplog) -> None:
    Card(monkeypatch)
    module = Module()
    # No card here: the number travels on the CPU.
    monkeypatch.setattr(throughput.torch, "tensor", lambda data, dtype, device: torch.as_tensor(data, dtype=dtype))

    def gather(parts, own) -> None:
        for rank, part in enumerate(parts):
            part.copy_(own + rank)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "all_gather", gather)
    with caplog.at_level(logging.INFO):
        TokensPerSecond().on_train_end(trainer(), module)
    assert "GiB by rank: 0: 1.50, 1: 2.50, 2: 3.50" in caplog.text
