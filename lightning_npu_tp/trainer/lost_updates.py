"""Which share of a plain optimizer's updates bfloat16 weights round away, seen in the first steps.

At the rates of fine-tuning nearly all of them: the run goes on, its loss looks right, and it barely trains. Nothing
else would tell.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_npu_tp.optim import AdamWBF16

_STEPS = 5
# Of each parameter's local part, and of a step: enough for a share, and little to keep.
_ELEMENTS_PER_PARAMETER = 4096
_ELEMENTS = 2**20
_MOST = 1 / 3


class LostUpdates:
    """Counts over some steps and warns once; made anew for each fit. Costs a copy of a million weights at most."""

    def __init__(self) -> None:
        self._steps = 0
        self._before: list[tuple[Tensor, Tensor]] = []
        self._lost: Tensor | None = None

    def before(self, optimizer: Optimizer) -> None:
        """Keep some of its bfloat16 weights."""
        self._before = [(p, part.clone()) for p, part in _samples(optimizer)] if self._steps < _STEPS else []

    def after(self, optimizer: Optimizer) -> None:
        """Compare them with what they are now; after the last of the steps one read of the device."""
        if not self._before:
            return
        name, rate = type(optimizer).__name__, optimizer.param_groups[0].get("lr")
        for parameter, old in self._before:
            gradient = parameter.grad
            if gradient is None:
                continue
            # Where there was no gradient, as in the rows of tokens that did not occur, nothing was to be updated.
            moves = _part(gradient) != 0
            lost = moves & (_part(parameter) == old)
            counts = torch.stack([lost.sum(), moves.sum()])
            self._lost = counts if self._lost is None else self._lost + counts
        self._before = []
        self._steps += 1
        if self._steps < _STEPS or self._lost is None:
            return
        lost_number, number = self._lost.tolist()
        if number and lost_number / number > _MOST:
            rank_zero_warn(
                f"In the first {_STEPS} steps {lost_number / number:.0%} of the updates of bfloat16 weights were lost: "
                f"they are smaller than the weights' rounding (1/256), at lr={rate:g}. {name} hardly trains such "
                f"weights. Use lightning_npu_tp.optim.AdamWBF16 (optimizer=adamw_bf16), which keeps the lost bits, or "
                f"trainer.precision=32-true or bf16-mixed."
            )


def _samples(optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameters, each with some of its local elements; of other dtypes and those that do not learn none."""
    if isinstance(optimizer, AdamWBF16):
        return
    left = _ELEMENTS
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.dtype == torch.bfloat16 and parameter.requires_grad and group.get("lr", 1) and left > 0:
                part = _part(parameter)
                left -= part.numel()
                yield parameter, part


def _part(tensor: Tensor) -> Tensor:
    local = tensor.detach()
    local = local.to_local() if isinstance(local, DTensor) else local
    # Spread over the whole, since neighbours often are alike: padded rows, unused experts.
    return local.reshape(-1)[:: max(1, local.numel() // _ELEMENTS_PER_PARAMETER)]
