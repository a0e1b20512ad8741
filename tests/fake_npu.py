"""A package torch_npu that stands in for the real one where a test needs its presence only."""

from __future__ import annotations

from pathlib import Path

import torch

FAKE = """
import sys, types, torch
torch.utils.rename_privateuse1_backend("npu")
npu = types.ModuleType("torch.npu")
npu.calls = []
npu.is_available = lambda: {count} > 0
npu.device_count = lambda: {count}
npu.set_device = lambda device: npu.calls.append(("set_device", str(device)))
npu.empty_cache = lambda: npu.calls.append(("empty_cache",))
npu.memory_stats = lambda device=None: {{"allocated_bytes.all.current": 7, "device": str(device)}}
torch._register_device_module("npu", npu)
"""


def fake_torch_npu(folder: Path, code: str, *, version: str | None = None, autoload: bool = False) -> str:
    """Write a package torch_npu with its metadata; returns the folder to put on the path."""
    torch_version = torch.__version__.split("+")[0]
    (folder / "torch_npu").mkdir(parents=True)
    (folder / "torch_npu" / "__init__.py").write_text(code + "def _autoload(): pass\n")
    metadata = folder / "torch_npu-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version or torch_version}\n")
    if autoload:
        (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return str(folder)
