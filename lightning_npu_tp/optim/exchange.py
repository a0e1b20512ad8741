"""A checkpoint of one kind of weights goes on in the other: masters in halves become float32 weights, and back.

What is loaded is a state dict by parameter name, as torch.distributed.checkpoint's functions make it; tensors are
DTensors of their parameter's placements, or plain ones of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_npu_tp.optim.adamw_bf16 import AdamWBF16, local_part, master_of
from lightning_npu_tp.optim.split_float import split


def take_masters(
    states: Mapping[str, dict[str, Any]], weights: Mapping[str, Tensor], optimizer: Optimizer
) -> dict[str, Tensor]:
    """The float32 masters in the states of an AdamWBF16, by name, for another optimizer; {} for one of its kind.

    states:  changed in place to what torch's AdamW has.
    weights: the checkpoint's, by name, in any dtype that holds their bfloat16 values.
    """
    masters: dict[str, Tensor] = {}
    if isinstance(optimizer, AdamWBF16):
        return masters
    for name, state in states.items():
        if "remainder" in state and name in weights:
            masters[name] = master_of(weights[name].detach().to(torch.bfloat16), state)
            del state["remainder"]
            state["exp_avg_sq"] = state["exp_avg_sq"].abs()
    return masters


def give_halves(
    states: Mapping[str, dict[str, Any]],
    parameters: Mapping[str, Tensor],
    optimizer: Optimizer,
    read: Callable[[str], Tensor | None],
) -> None:
    """Give the states of a plain AdamW what an AdamWBF16 keeps of float32 weights, and the parameters their other half.

    read: the checkpoint's float32 weight, in its parameter's placement; None if it has it in no more bits than a
          bfloat16. One is asked for at a time, since all of them are as large as the rest of the state.
    """
    if not isinstance(optimizer, AdamWBF16):
        return
    for name, state in states.items():
        parameter = parameters[name]
        if "remainder" in state or parameter.dtype != torch.bfloat16 or "exp_avg_sq" not in state:
            continue
        master = read(name)
        if master is None:
            continue
        state["remainder"] = torch.zeros_like(parameter, dtype=torch.int16)
        parts = (parameter.detach(), state["remainder"], state["exp_avg_sq"])
        weight, remainder, second = map(local_part, parts)
        with torch.no_grad():
            wide = torch.empty_like(weight, dtype=torch.float32).copy_(local_part(master))
            split(wide, weight, remainder, second, torch.empty_like(wide, dtype=torch.int32))
