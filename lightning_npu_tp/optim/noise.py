"""Random bits of each element of a parameter, from its place in the whole: the same whichever rank holds it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# Sizes, offsets in the whole and strides in the whole of a rank's part, from the outermost dimension.
Place = tuple[tuple[int, int, int], ...]
# Steps that follow each other are to differ in all bits: 2^32 divided by the golden ratio, as a signed number.
_GOLDEN = 0x9E3779B1 - 2**32


def place_of(parameter: Tensor, order: Sequence[int]) -> Place:
    """Where the local part of a parameter lies in the whole, in as few dimensions as can tell it.

    order: the parameter's dimensions as its elements are counted, the outermost first.
    """
    whole = tuple(parameter.shape)
    if isinstance(parameter, DTensor):
        sizes, offsets = compute_local_shape_and_global_offset(whole, parameter.device_mesh, parameter.placements)
    else:
        sizes, offsets = whole, (0,) * len(whole)
    strides = [math.prod(whole[dim + 1 :]) for dim in range(len(whole))]
    place: list[tuple[int, int, int]] = []
    for dim in reversed(order):
        size, offset, stride = sizes[dim], offsets[dim], strides[dim]
        if place and size and place[0][0] * place[0][2] == stride:
            # Everything further in is whole: one dimension with it.
            inner_size, _, inner_stride = place[0]
            place[0] = (inner_size * size, offset * inner_size, inner_stride)
        else:
            place.insert(0, (size, offset, stride))
    return tuple(place) or ((1, 0, 1),)


def key_of(seed: int, number: int) -> int:
    """A key of 31 bits for one parameter."""
    text = f"{seed}/{number}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") >> 1


def noise(place: Place, start: int, stop: int, key: int, step: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Twice 16 random bits, int32 [stop - start] in [0, 65535], of elements `start` to `stop` of the flattened part.

    A hash of key, step and global position (the mixing function is "lowbias32"): no generator, no state.

    step: a scalar, on the device or on the host: the device is not asked for its value.
    """
    bits = _positions(place, start, stop, device).bitwise_xor_(key).bitwise_xor_(step.to(torch.int32) * _GOLDEN)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        bits.bitwise_xor_(_shifted(bits, shift)).mul_(factor)
    upper = _shifted(bits, 16)
    return bits.bitwise_xor_(upper).bitwise_and_(0xFFFF), upper


def _shifted(bits: Tensor, by: int) -> Tensor:
    # The shift of a signed number brings its sign in from above.
    return (bits >> by).bitwise_and_(2 ** (32 - by) - 1)


def _positions(place: Place, start: int, stop: int, device: torch.device) -> Tensor:
    """Where these elements lie in the flattened whole, int32, modulo 2^32."""
    left = torch.arange(start, stop, dtype=torch.int32, device=device)
    if len(place) == 1:
        ((_, offset, stride),) = place
        return left.add_(offset).mul_(stride)
    position = torch.zeros_like(left)
    for size, offset, stride in reversed(place):
        position += (left % size + offset) * stride
        left = left // size
    return position
