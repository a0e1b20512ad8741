"""`Trainer(accelerator="npu")`, with a stand-in for torch_npu.

Catches: a run that asks for NPUs and trains on the CPU, devices silently dropped or invented, and
Lightning's "not available" without a reason.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from fake_npu import FAKE, fake_torch_npu
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_npu_tp.devices import device
from lightning_npu_tp.errors import ConfigError, DeviceError
from lightning_npu_tp.tools.testing.ranks import run_ranks
from lightning_npu_tp.trainer.accelerator import NPUAccelerator
from lightning_npu_tp.trainer.registration import register_with_lightning


@pytest.fixture
def four_npus(monkeypatch):
    monkeypatch.setattr(device, "_count_npus", lambda: 4)


@pytest.mark.parametrize(
    ("devices", "indices"),
    [
        ("auto", [0, 1, 2, 3]),
        (-1, [0, 1, 2, 3]),
        ("-1", [0, 1, 2, 3]),
        (2, [0, 1]),
        ("2", [0, 1]),
        ([3, 1], [3, 1]),
        ("0,1", [0, 1]),
        ("3,", [3]),
        (" 0, 2 ", [0, 2]),
    ],
)
def test_devices_are_parsed(four_npus, devices, indices):
    assert NPUAccelerator.parse_devices(devices) == indices


@pytest.mark.parametrize("devices", [8, "8", [0, 4], "0,7", [-2]])
def test_more_devices_than_there_are_is_an_error_that_names_both_numbers(four_npus, devices):
    with pytest.raises(
        ConfigError, match=r"trainer\.devices=(.|\n)*asks for \d NPUs(.|\n)*has 4, 0 to 3(.|\n)*at most 4"
    ):
        NPUAccelerator.parse_devices(devices)


@pytest.mark.parametrize("devices", [0, -3, "two", "0,x", True, None, 1.5, [], [0, "1"], [True], ""])
def test_what_names_no_devices_is_refused(four_npus, devices):
    with pytest.raises(ConfigError, match="names no devices"):
        NPUAccelerator.parse_devices(devices)


def test_a_device_named_twice_is_refused(four_npus):
    with pytest.raises(ConfigError, match="twice"):
        NPUAccelerator.parse_devices("1,1")


def test_without_torch_npu_the_trainer_says_what_is_missing_and_what_to_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    wanted = r"trainer.accelerator=npu cannot be used here: torch_npu is not installed(.|\n)*trainer.accelerator=cpu"
    with pytest.raises(DeviceError, match=wanted):
        Trainer(accelerator="npu", logger=False, enable_checkpointing=False)
    assert not NPUAccelerator.is_available()
    assert NPUAccelerator.auto_device_count() == 0


def test_registering_twice_is_harmless_and_keeps_the_name():
    register_with_lightning()
    register_with_lightning()
    assert AcceleratorRegistry["npu"]["accelerator"] is NPUAccelerator
    assert NPUAccelerator.name() == "npu"
    assert issubclass(NPUAccelerator, Accelerator)


def use_the_fake(rank, world_size, path):
    # Lightning warns of a registered accelerator that is not used, and of much else.
    warnings.simplefilter("ignore")
    sys.path.insert(0, path)
    trainer = Trainer(
        accelerator="npu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=1
    )
    refusal = None
    try:
        trainer.fit(BoringModel())
    except ConfigError as error:
        refusal = str(error)
    accelerator = trainer.accelerator
    accelerator.setup_device(torch.device("npu", 2))
    stats = accelerator.get_device_stats(torch.device("npu", 2))
    del torch.npu.calls[:]
    accelerator.setup_device(torch.device("npu", 3))
    accelerator.teardown()
    parallel = [str(each) for each in NPUAccelerator.get_parallel_devices(NPUAccelerator.parse_devices("auto"))]
    return refusal, stats, torch.npu.calls, parallel, NPUAccelerator.auto_device_count()


def test_one_device_without_a_strategy_never_trains_on_the_cpu(tmp_path):
    path = fake_torch_npu(Path(tmp_path), FAKE.format(count=4))
    ((refusal, stats, calls, parallel, count),) = run_ranks(use_the_fake, 1, path, backend=None)
    assert "placed this run on the device 'cpu'" in refusal
    assert "strategy='npu_tp'" in refusal
    assert stats["allocated_bytes.all.current"] == 7 and stats["device"] == "npu:2"
    assert calls == [("set_device", "npu:3"), ("empty_cache",)]
    assert parallel == ["npu:0", "npu:1", "npu:2", "npu:3"] and count == 4
