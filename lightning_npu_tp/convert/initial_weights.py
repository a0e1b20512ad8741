"""Initial weights that depend on the seed and the parameter's name, not on the layout.

Each parameter (each expert of a stacked one) has a random stream of its own, keyed by a hash of seed
and name. A rank draws the streams that its shard needs and keeps its slice, so that every layout
starts from the same model. Always drawn on the CPU in float32: a device's generator would make the
model depend on the device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from lightning_npu_tp.parallel.plan import Rule, chunk_bounds


def stream_seed(seed: int, name: str, index: int | None = None) -> int:
    """A 63-bit seed for one parameter (and expert), the same on every machine and Python."""
    text = f"{seed}/{name}" if index is None else f"{seed}/{name}/{index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _draw(shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    return torch.empty(shape).normal_(0.0, std, generator=torch.Generator().manual_seed(seed))


def initial_shard(
    name: str, shape: tuple[int, ...], rule: Rule, rank: int, ranks: int, *, seed: int, std: float
) -> Tensor:
    """Rank's part of a fresh parameter of global `shape`, float32 on the CPU, contiguous.

    Experts are drawn one by one, so that a rank never draws another's; other parameters are drawn
    whole and cut.
    """
    local_shape = rule.local_shape(shape, rank, ranks)
    if rule.init != "normal":
        return torch.ones(local_shape) if rule.init == "ones" else torch.zeros(local_shape)
    if rule.axis == "expert":
        start, stop = chunk_bounds(shape[0], rank, ranks)
        experts = torch.empty(local_shape)
        for index in range(start, stop):
            experts[index - start] = _draw(shape[1:], std, stream_seed(seed, name, index))
        return experts
    whole = _draw(shape, std, stream_seed(seed, name))
    if rule.dim is None:
        return whole
    start, stop = chunk_bounds(shape[rule.dim], rank, ranks)
    return whole.narrow(rule.dim, start, stop - start).clone(memory_format=torch.contiguous_format)
