"""The simulated card under every test of this folder, before anything imports torch_npu."""

from __future__ import annotations

import os
import zlib

import pytest

import ascend_sim

ascend_sim.install(devices=4)

import torch_npu  # noqa: E402, F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """TEST_ORDER=7: another order of the files, and of the tests of each, to find what one leaves for the next."""
    if seed := os.environ.get("TEST_ORDER"):
        items.sort(key=lambda item: [zlib.crc32(f"{seed} {name}".encode()) for name in (item.path, item.nodeid)])
