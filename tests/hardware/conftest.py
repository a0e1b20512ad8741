"""Which card the tests of this folder run on: `--device npu|cuda`, or HARDWARE_DEVICE; npu if nobody says.

A simulated card is as good as a real one: `make test-sim` runs this folder on simulated ones. Where the card is not
there the tests are skipped with the reason that keeps it away, unless it was asked for: then they fail.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from lightning_npu_tp.devices.device import npu_problem, torch_module

KINDS = ("npu", "cuda")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=KINDS, help="type of the cards to test (HARDWARE_DEVICE, else npu)")


def problem(device_type: str) -> str | None:
    """What keeps this machine from using a card of that type."""
    if device_type == "npu":
        return npu_problem()
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


@pytest.fixture(scope="session")
def card(request: pytest.FixtureRequest) -> str:
    """Type of the cards."""
    asked_for = request.config.getoption("--device") or os.environ.get("HARDWARE_DEVICE")
    if asked_for is not None and asked_for not in KINDS:
        pytest.fail(f"HARDWARE_DEVICE={asked_for!r} is none of {KINDS}")
    device_type = asked_for or "npu"
    if reason := problem(device_type):
        if asked_for:
            pytest.fail(f"{device_type} was asked for: {reason}", pytrace=False)
        pytest.skip(reason)
    return device_type


@pytest.fixture(scope="session")
def runtime(card: str) -> Any:
    """torch.npu or torch.cuda."""
    return torch_module(card)


@pytest.fixture(scope="session")
def several(runtime: Any) -> int:
    """How many cards the tests of several use: four, or two where there are fewer."""
    count = runtime.device_count()
    if count < 2:
        pytest.skip(f"needs two cards, and this machine has {count}")
    return 4 if count >= 4 else 2
