"""Enters accelerator "npu" and strategy "npu_tp" into Lightning's registries, without importing Lightning for it.

Lightning has no entry point for either, so somebody must do it before a Trainer is built. Where Lightning is there
already, that is at once; otherwise right after its import, whoever imports it. `pytorch_lightning` is another package,
whose Trainer takes its own classes only: where it is there already, both names stand for an error that says so. This
module imports nothing heavy.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

from typing_extensions import override

_LIGHTNING = "lightning.pytorch"
_OTHER = "pytorch_lightning"
OTHER_IMPORT = (
    "pytorch_lightning is another package than lightning.pytorch, and its Trainer takes no classes of that. Write "
    "import lightning.pytorch as pl instead of import pytorch_lightning as pl, also for LightningModule and callbacks."
)


def register_with_lightning() -> None:
    """Make `Trainer(accelerator="npu", strategy="npu_tp")` work, in whatever order the two packages are imported."""
    if _OTHER in sys.modules:
        _explain_other()
    if _LIGHTNING in sys.modules:
        _register()
    else:
        # By name: after a reload of this module an earlier finder is of another class, and two would ask each other.
        sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != _AfterLightning.__name__]
        sys.meta_path.insert(0, _AfterLightning())


def _register() -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    # It registers itself. Not by name from here: it may be what is being imported, and has imported Lightning.
    importlib.import_module("lightning_npu_tp.trainer.accelerator")
    # A function, for the same reason: the strategy's own import may be what has brought Lightning in.
    StrategyRegistry.register(
        "npu_tp", _strategy, description="Tensor and expert parallelism on NPU, CUDA and CPU", override=True
    )


def _explain_other() -> None:
    from pytorch_lightning.accelerators import AcceleratorRegistry
    from pytorch_lightning.strategies import StrategyRegistry

    StrategyRegistry.register("npu_tp", _refuse, description=OTHER_IMPORT, override=True)
    AcceleratorRegistry.register("npu", _refuse, description=OTHER_IMPORT, override=True)


def _refuse(**settings: Any) -> Any:
    from lightning_npu_tp.errors import ConfigError

    raise ConfigError(OTHER_IMPORT)


def _strategy(**settings: Any) -> Any:
    from lightning_npu_tp.trainer.strategy import NPUTensorParallelStrategy

    return NPUTensorParallelStrategy(**settings)


class _AfterLightning(MetaPathFinder, Loader):
    """Finds `lightning.pytorch` as the other finders do, and registers once it has been executed."""

    def __init__(self) -> None:
        self._loader: Any = None

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _LIGHTNING:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    @override
    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return cast("ModuleType | None", self._loader.create_module(spec))

    @override
    def exec_module(self, module: ModuleType) -> None:
        # Whoever asks the module later, for its source say, finds its own loader.
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        sys.meta_path.remove(self)
        _register()
