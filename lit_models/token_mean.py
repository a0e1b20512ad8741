"""The training loss is the sum over tokens divided by the number of tokens that count.

Over all micro-batches of an optimizer step and all data ranks: not a mean of micro-batch means, in
which a token of a half-empty batch weighs twice. The count is a device tensor and is never read on the
host. It is known before the backward of a step of one micro-batch; with accumulation only after the
last one, so the micro-batches are divided by a constant and the gradients rescaled once at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# A mean over data ranks may be below one token. Where no token counts at all the numerator is zero too,
# and any positive divisor keeps the gradient at zero instead of NaN.
_LEAST_TOKENS = 2.0**-20


class TokenMean:
    """Sums of one accumulation window.

    mean_over_data: scalar tensor -> its mean over the data ranks. The mean, because data-parallel
    gradients are averaged: the number of ranks then cancels.
    """

    def __init__(self, mean_over_data: Callable[[Tensor], Tensor]) -> None:
        self._mean_over_data = mean_over_data
        self._constant: int | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the window; the next micro-batch opens a new one."""
        self._tokens: Tensor | None = None
        self._loss: Tensor | None = None
        self._micro_batches = 1
        self._rescale = False

    def divisor(self, tokens: Tensor, size: int, micro_batches: int) -> Tensor | int:
        """What to divide this micro-batch's summed loss by before its backward.

        tokens:        scalar, labels that count in this micro-batch.
        size:          all labels of this micro-batch; any constant of that order will do.
        micro_batches: by how many Lightning divides the loss (accumulate_grad_batches).
        """
        self._micro_batches = micro_batches
        self._tokens = tokens if self._tokens is None else self._tokens + tokens
        if micro_batches == 1:
            # Whole numbers up to 2**24 are exact in float32, so a float64 loss stays one.
            return self._mean_tokens(torch.float32)
        self._rescale = True
        # One constant for good: micro-batches of several shapes, on several ranks, must share it.
        self._constant = self._constant or size
        return self._constant

    def add_loss(self, loss_sum: Tensor) -> None:
        """loss_sum: scalar, this micro-batch's summed loss."""
        loss_sum = loss_sum.detach()
        self._loss = loss_sum if self._loss is None else self._loss + loss_sum

    def loss(self) -> Tensor:
        """Mean loss per counted token of the window, over all data ranks; 0 where none counted."""
        assert self._loss is not None, "no micro-batch since the last reset"
        return self._mean_over_data(self._loss) / self._mean_tokens(self._loss.dtype)

    def rescale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Turn accumulated gradients into those of the window's mean loss, in place.

        An epoch's last window may hold fewer micro-batches than Lightning divided by; the factor
        undoes that division whatever their number.
        """
        if not self._rescale:
            return
        assert self._constant is not None and self._loss is not None
        gradients = [_local(p.grad) for p in parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, self._constant * self._micro_batches / self._mean_tokens(self._loss.dtype))

    def _mean_tokens(self, dtype: torch.dtype) -> Tensor:
        assert self._tokens is not None, "no micro-batch since the last reset"
        return self._mean_over_data(self._tokens.to(dtype)).clamp(min=_LEAST_TOKENS)


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
