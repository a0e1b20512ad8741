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

from lightning_npu_tp.convert.shard_spec import ShardSpec, size_of


def stream_seed(seed: int, name: str, index: int | None = None) -> int:
    """A 63-bit seed for one parameter (and expert), the same on every machine and Python."""
    text = f"{seed}/{name}" if index is None else f"{seed}/{name}/{index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def initial_shard(name: str, spec: ShardSpec, *, seed: int, std: float, zero_row: int | None = None) -> Tensor:
    """The rank's part of a fresh parameter, float32 on the CPU, contiguous.

    Experts are drawn one by one, so that a rank never draws another's; other parameters are drawn
    whole and cut.

    zero_row: global index in dim 0 that starts at zero: an embedding's padding.
    """

    def draw(shape: tuple[int, ...], index: int | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(stream_seed(seed, name, index))
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    if spec.rule.init != "normal":
        return torch.full(size_of(spec.bounds), float(spec.rule.init == "ones"))
    if spec.rule.axis == "expert":
        experts, (start, stop) = torch.empty(size_of(spec.bounds)), spec.bounds[0]
        for index in range(start, stop):
            experts[index - start] = draw(spec.shape[1:], index)
        return experts
    whole = draw(spec.shape)
    if zero_row is not None:
        whole[zero_row] = 0
    return spec.cut(whole)
