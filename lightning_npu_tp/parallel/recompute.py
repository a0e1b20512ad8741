"""Activation recompute: a layer keeps its input only, and runs again in the backward pass.

`checkpointed` runs one decoder layer so that the second run is the first one over: it sees the same slicing
of sequences, and what a layer has `remembered` (token masks, the router's choice, the numbers of rows to
exchange) is taken from the first run and not computed again. A near-tie in the router thus cannot be
decided the other way, nothing is read on the host twice, and nothing is counted twice.

Built on torch's non-reentrant checkpoint, which keeps the first run's graph: losses that a layer made on
the side keep their gradients.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

from torch.utils.checkpoint import checkpoint

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.parallel.tensor_region import Region

Recompute = Literal["none", "moe", "block"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "moe", "block")

T = TypeVar("T")
# Per thread: autograd runs the backward pass, and with it the second run, in threads of its own.
_present = threading.local()


class _Notes:
    """What one layer remembered in its first run, in order."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.next = 0
        self.is_replay = False

    @contextmanager
    def open(self, *, replay: bool, region: Region, length: int | None) -> Iterator[None]:
        before = getattr(_present, "notes", None)
        _present.notes, self.next, self.is_replay = self, 0, replay
        try:
            with region.sequence(length):
                yield
        finally:
            _present.notes = before


def remembered(compute: Callable[[], T]) -> T:
    """The result of `compute`, or in a second run what it was in the first."""
    notes: _Notes | None = getattr(_present, "notes", None)
    if notes is None:
        return compute()
    if not notes.is_replay:
        notes.values.append(compute())
        return notes.values[-1]
    notes.next += 1
    return notes.values[notes.next - 1]


def is_second_run() -> bool:
    """Whether this forward repeats one whose statistics have been counted."""
    notes: _Notes | None = getattr(_present, "notes", None)
    return notes is not None and notes.is_replay


def checkpointed(region: Region, keep_random_state: bool, function: Callable[..., Any], *args: Any) -> Any:
    """Run `function(*args)` and keep no activations; it runs again when the backward pass needs them.

    keep_random_state: for functions with dropout; costs a read of the device's generator.
    """
    notes, length = _Notes(), region.length

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        opened = partial(notes.open, region=region, length=length)
        return opened(replay=False), opened(replay=True)

    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=keep_random_state, context_fn=contexts)


def has_dropout(config: object) -> bool:
    """Whether any dropout of a transformers config is above zero."""
    return any("dropout" in name and isinstance(value, float) and value > 0 for name, value in vars(config).items())


def recompute_layers(model: Any, region: Region, config: object) -> None:
    """Let every decoder layer of a transformers model run `checkpointed` while it trains.

    Uses transformers' own switch, which leaves FSDP's hooks outside. Raises ConfigError for a model without it.
    """
    run = partial(checkpointed, region, has_dropout(config))
    switched = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    for module in switched:
        module.gradient_checkpointing = True
        module._gradient_checkpointing_func = run
    if not switched:
        raise ConfigError(
            f"recompute=block needs layers that transformers can checkpoint, and {type(model).__name__} has none. "
            f"Set strategy.recompute=none."
        )
