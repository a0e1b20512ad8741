"""What one forward pass of a sharded model carries along: handed from layer to layer as an argument, kept by nobody.

The causal LM makes a `ForwardPass` for each call and its decoder hands it down; a layer that is called by itself
makes one of its own, which is whole and counts all tokens. So two passes never meet, whatever their order or
threads, and a model between two passes, or a copy of it, holds nothing of either.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_npu_tp.parallel.tensor_region import Region

T = TypeVar("T")
# The result of a function, or what it was in the first run of a layer that is recomputed.
Remember = Callable[[Callable[[], T]], T]


def at_once(compute: Callable[[], T]) -> T:
    """The result of `compute`: what remembers for a caller that is never recomputed."""
    return compute()


@cache
def _accepts_pass(forward: Callable[..., Any]) -> bool:
    parameters = inspect.signature(forward).parameters.values()
    return any(parameter.name == "step" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def handed(step: ForwardPass, module: Any) -> dict[str, ForwardPass]:
    """Keyword arguments that hand `step` to `module`: none to a module of a user's whose forward does not take it."""
    return {"step": step} if _accepts_pass(type(module).forward) else {}


class Memory:
    """What one recomputed layer decided in its first run, in order, for the runs after it."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.next = 0
        self.num_runs = 0

    def begin_run(self) -> None:
        """Start from the first value again; from the second run on they are read and no longer written."""
        self.num_runs, self.next = self.num_runs + 1, 0

    def remember(self, compute: Callable[[], T]) -> T:
        """The result of `compute` in the first run, in which alone it is called."""
        if self.num_runs == 1:
            self.values.append(compute())
        self.next += 1
        return self.values[self.next - 1]


class ForwardPass:
    """One forward pass of a model. Its attributes are fixed once it is made.

    region:         of the model, as this pass uses it: whole, or sliced for sequences of one length.
    token_mask:     bool [B, S] (global), false for padding, which no balance loss and no count of picks looks at; None
                    counts all.
    balance_losses: of each mixture layer in training, a scalar with gradient, already times its factors; the layers
                    add to the list, and the same on all ranks that see the same tokens.
    layers:         the decoder layers that took part, added by themselves, so that one left out is seen.
    shown:          what the caller asked to see of the inside ("hidden_states", "attentions", "router_logits"), whole
                    on every rank, one tensor a layer, in order; added by whoever computes it.
    has_gradient:   whether a backward pass may follow.
    memory:         of the layer that is running, if it is one that is recomputed.

    No dataclass: FSDP takes those among a layer's arguments apart and hands on a copy, whose list nobody would read.
    """

    def __init__(self, region: Region, token_mask: Tensor | None = None, show: Iterable[str] = ()) -> None:
        self.region = region
        self.token_mask = token_mask
        self.balance_losses: list[Tensor] = []
        self.shown: dict[str, list[Tensor]] = {name: [] for name in show}
        self.layers: list[Any] = []
        self.has_gradient = torch.is_grad_enabled()
        self.memory: Memory | None = None

    @property
    def is_second_run(self) -> bool:
        """Whether the layer repeats a run whose statistics have been counted and whose decisions stand."""
        return self.memory is not None and self.memory.num_runs > 1

    def remember(self, compute: Callable[[], T]) -> T:
        """The result of `compute`, or in a second run what it was in the first."""
        return compute() if self.memory is None else self.memory.remember(compute)

    def show(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor of the inside for the caller, if it was asked for."""
        if name in self.shown:
            self.shown[name].append(tensor)

    def with_memory(self, memory: Memory) -> ForwardPass:
        """This pass for the first run of a recomputed layer, whose `memory` is kept between its runs."""
        step = copy.copy(self)
        step.memory = memory
        return step

    def without_results(self, memory: Memory) -> ForwardPass:
        """This pass for the runs after the first: balance losses of those, and what they show, go nowhere."""
        step = self.with_memory(memory)
        step.balance_losses, step.layers, step.shown = [], [], {name: [] for name in self.shown}
        return step
