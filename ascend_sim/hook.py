"""What makes torch_npu find the simulated card when it is imported: libraries before it, kernels after it.

Loaded by its path from the sitecustomize of child processes and imported by `ascend_sim.install`; it stands alone, so
that a process that never imports torch_npu pays for an import hook and nothing else.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# Set by install; whoever inherits it runs on the simulated card.
LIBRARIES = "ASCEND_SIM_LIBRARIES"
PARTS = ("ascendcl", "hccl", "hcomm", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")

_handles: dict[str, ctypes.CDLL] = {}


def library(name: str) -> ctypes.CDLL:
    """A library of the simulator, loaded once; the loader then finds it under its name for everybody else."""
    if name not in _handles:
        path = os.path.join(os.environ[LIBRARIES], f"lib{name}.so")
        _handles[name] = ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    return _handles[name]


def load_runtime() -> None:
    """Load what stands in for CANN; needs neither torch nor torch_npu."""
    for name in PARTS:
        library(name)


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        import torch  # noqa: F401  (libopapi needs its libraries)

        load_runtime()
        library("opapi")
        self._loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _register() -> None:
    try:
        import ascend_sim
    except ImportError:
        # A child whose path lacks the package; at the end, so that nothing else is found there instead.
        sys.path.append(str(Path(__file__).resolve().parent.parent))
        import ascend_sim
    ascend_sim._after_torch_npu()


class Finder(importlib.abc.MetaPathFinder):
    """Puts the loader above around torch_npu's own."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The spec of torch_npu with the loader above; None for every other module."""
        if name != "torch_npu":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """Hook the import of torch_npu in this process. Twice is once."""
    # By name: the same file may be loaded under two module names.
    if not any(type(finder).__name__ == "Finder" and hasattr(finder, "is_ascend_sim") for finder in sys.meta_path):
        finder = Finder()
        finder.is_ascend_sim = True  # type: ignore[attr-defined]
        sys.meta_path.insert(0, finder)
