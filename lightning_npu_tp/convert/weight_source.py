"""Where a model on the meta device takes its weights from when it is converted: a mark on the model.

Conversion asks what is marked to fill the shards and knows no file; `weights/load.py` marks with a folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_npu_tp.models.file_names import Bounds, KeyTable

_MARK = "_lightning_npu_tp_weights"


@dataclass(frozen=True)
class Target:
    """A parameter or buffer to fill.

    names:    of the parameter, its own first, then those of modules that share it.
    shape:    global.
    bounds:   which part of it `tensor` is.
    tensor:   this rank's part, on its device.
    optional: whether the source may lack it; it then stays as it is.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    bounds: Bounds
    tensor: Tensor
    optional: bool = False


class WeightSource(Protocol):
    """What fills the shards of one model."""

    def fill(self, targets: Sequence[Target], table: KeyTable, *, family: str) -> Any:
        """Fill every target; every rank calls it. Returns a report with `line()`, for the table at the start."""


def mark(model: nn.Module, source: WeightSource) -> None:
    """Have `source` fill `model` when it is converted."""
    object.__setattr__(model, _MARK, source)


def source_of(model: nn.Module) -> Any:
    """The WeightSource that `model` is marked with, or None."""
    return getattr(model, _MARK, None)
