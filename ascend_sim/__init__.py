"""A simulated Ascend under the real torch_npu: a stand-in for CANN on which the released wheel runs without a card.

    import ascend_sim
    ascend_sim.install(devices=4)        # before torch_npu is imported; children inherit it
    import torch, torch_npu

or, for a program as it is, `python -m ascend_sim run -n 4 train.py …`. What it shows and what it cannot show is in
docs/simulator.md. Imports nothing of the packages that are tested with it, and torch only with torch_npu.
"""

from __future__ import annotations

from ascend_sim.build import BuildError
from ascend_sim.faults import inject
from ascend_sim.installing import SimulatorError, install, installed
from ascend_sim.installing import after_torch_npu as _after_torch_npu
from ascend_sim.report import counters, stream_misuses, synchronisations

__all__ = [
    "BuildError",
    "SimulatorError",
    "counters",
    "inject",
    "install",
    "installed",
    "stream_misuses",
    "synchronisations",
    "_after_torch_npu",
]
