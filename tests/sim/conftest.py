"""The simulated card under every test of this folder, before anything imports torch_npu."""

from __future__ import annotations

import ascend_sim

ascend_sim.install(devices=4)

import torch_npu  # noqa: E402, F401
