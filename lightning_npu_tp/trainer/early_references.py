"""Lets what was made before conversion go on with the parameters of after it: optimizers, lists of averages, metrics.

A plain tensor cannot become a DTensor and stay the object it is, so conversion puts other parameters into the module.
An optimizer that was built in `__init__` would step tensors that no forward reads, without an error. Python knows who
holds an object: every list, tuple, dictionary, set, closure and attribute that holds an old parameter gets the new
one. What cannot be changed is named.
"""

from __future__ import annotations

import gc
import weakref
from functools import partial
from types import CellType, FrameType, FunctionType, GeneratorType
from typing import Any

from torch import Tensor, nn

from lightning_npu_tp.errors import ConversionError

Before = dict[str, "weakref.ref[Tensor]"]


def note_parameters(module: nn.Module) -> Before:
    """The parameters of now by name, to be handed to `follow_parameters` when they may be others; keeps none alive."""
    return {name: weakref.ref(parameter) for name, parameter in module.named_parameters(remove_duplicate=False)}


def follow_parameters(module: nn.Module, before: Before) -> None:
    """Put the parameters of now where those of `before` are still held.

    Local variables of functions that are running keep what they have.
    Raises ConversionError for a holder that cannot be changed, and for states that an optimizer has already: they are
    whole.
    """
    now: dict[int, Tensor] = {}
    names: dict[int, str] = {}
    old: list[Tensor] = []
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, reference in before.items():
        parameter = reference()
        if parameter is not None and parameter is not parameters.get(name, parameter) and id(parameter) not in now:
            now[id(parameter)], names[id(parameter)] = parameters[name], name
            old.append(parameter)
    del parameters
    if not old:
        return
    # What is held by garbage only is held by nobody.
    gc.collect()
    for holder in gc.get_referrers(*old):
        if holder is not old:
            _replace(holder, now, names)


def _replace(holder: Any, now: dict[int, Any], names: dict[int, str]) -> None:
    """Put `now[id(x)]` in the place of each x that `holder` holds; names: of what x is, for an error."""
    if isinstance(holder, (FrameType, GeneratorType)):
        return
    if isinstance(holder, list):
        holder[:] = [now.get(id(value), value) for value in holder]
    elif isinstance(holder, tuple):
        values: list[Any] = [now.get(id(value), value) for value in holder]
        other = type(holder)(*values) if hasattr(holder, "_fields") else tuple(values)
        inside = next(names[id(value)] for value in holder if id(value) in now)
        for outer in gc.get_referrers(holder):
            _replace(outer, {id(holder): other}, {id(holder): inside})
    elif isinstance(holder, dict):
        _replace_in_dictionary(holder, now, names)
    elif isinstance(holder, set):
        values = [now.get(id(value), value) for value in holder]
        holder.clear()
        holder.update(values)
    elif isinstance(holder, CellType):
        holder.cell_contents = now[id(holder.cell_contents)]
    elif isinstance(holder, FunctionType) and id(holder.__defaults__) in now:
        holder.__defaults__ = now[id(holder.__defaults__)]
    elif isinstance(holder, partial):
        arguments = now.get(id(holder.args), tuple(now.get(id(value), value) for value in holder.args))
        # How a partial is unpickled; typed for nobody.
        holder.__setstate__((holder.func, arguments, holder.keywords, vars(holder)))  # type: ignore[attr-defined]
    elif not isinstance(holder, frozenset) and hasattr(holder, "__dict__"):
        _replace_in_dictionary(vars(holder), now, names)
    else:
        held = next(names[id(value)] for value in gc.get_referents(holder) if id(value) in now)
        raise ConversionError(
            f"A {type(holder).__name__} holds {held} of before the model was sharded, and cannot be changed. Make it a "
            f"list, or build it in configure_optimizers or on_fit_start."
        )


def _replace_in_dictionary(holder: dict[Any, Any], now: dict[int, Any], names: dict[int, str]) -> None:
    for key, value in list(holder.items()):
        if id(value) in now:
            holder[key] = now[id(value)]
        if id(key) in now:
            whole = value.values() if isinstance(value, dict) else ()
            if any(isinstance(each, Tensor) and each.shape == key.shape for each in whole):
                raise ConversionError(
                    f"A dictionary, as an optimizer's state is one, holds whole tensors for {names[id(key)]} from "
                    f"before the model was sharded. Make the optimizer in configure_optimizers; Lightning loads its "
                    f"states (fit(ckpt_path=…))."
                )
            holder[now[id(key)]] = holder.pop(key)
