"""A float32 number in two halves: the bfloat16 that a forward reads, and the sixteen bits that it lost.

In plain integer arithmetic, element by element, so that it runs on every device and on any part of a parameter; each
function goes over its elements as seldom as it can, since that is what an update costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_UPPER = 2**16
# Of a tie that rounds down, with its upper half even: what is left of it, 15 bits up.
_TIE = 2**30


def join(weight: Tensor, remainder: Tensor, marked: Tensor, out: Tensor, spare: Tensor) -> None:
    """Write the float32 values whose halves these are into `out`; any shape, the same for all.

    weight:    bfloat16, the value rounded to nearest, ties to even.
    remainder: int16, how far the value's bits lie from those of the weight.
    marked:    float32 or bfloat16, positive but for a mark in its sign, which is taken off: see `split`.
    spare:     int32, overwritten.
    """
    bits = out.view(torch.int32)
    bits.copy_(remainder).add_(weight.view(torch.int16), alpha=_UPPER)
    if marked.dtype == torch.float32:
        torch.bitwise_right_shift(marked.view(torch.int32), 31, out=spare)
    else:
        spare.copy_(marked.view(torch.int16)).bitwise_right_shift_(15)
    bits.sub_(spare, alpha=_UPPER)
    marked.abs_()


def split(value: Tensor, weight: Tensor, remainder: Tensor, marked: Tensor, spare: Tensor) -> None:
    """Write the halves of float32 values into bfloat16 `weight` and int16 `remainder`.

    marked: positive, float32 or bfloat16; gets a negative sign where the value is a tie that was rounded down.
    spare:  int32, overwritten.

    `join` makes the same bits of them again, and of a NaN some NaN. Of the numbers that round to one bfloat16, sixteen
    bits can tell 65,536 apart. To an even one there round 65,537, since both of its ties do, and which of the two it is
    no bit is left to tell; hence the mark.
    """
    weight.copy_(value)
    bits = value.view(torch.int32)
    # Into the range of int16 first: the conversion alone wraps on one device and saturates on another.
    remainder.copy_(torch.bitwise_left_shift(bits, 16, out=spare).bitwise_right_shift_(16))
    torch.bitwise_left_shift(bits, 15, out=spare).eq_(_TIE)
    signs = marked.view(torch.int32 if marked.dtype == torch.float32 else torch.int16)
    if signs.dtype == torch.int32:
        signs.bitwise_or_(spare.bitwise_left_shift_(31))
    else:
        signs.bitwise_or_(spare.to(torch.int16).bitwise_left_shift_(15))


def round_stochastically(value: Tensor, noise: Tensor, out: Tensor) -> None:
    """Write float32 values into bfloat16 `out`, rounded up or down with the probability that keeps their mean.

    noise: int32, even in [0, 65535], of the same shape; overwritten.
    """
    out.view(torch.int16).copy_(noise.add_(value.view(torch.int32)).bitwise_right_shift_(16))
