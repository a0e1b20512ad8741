"""npu_rotary_mul: x * cos + rotated(x) * sin on four dimensions, pairs in halves or as neighbours.

Source: torch_npu/_op_plugin_docs.py (jit_compile=False). The layout is not an argument: it is read off the
shape of the cosines, which have ones where they are broadcast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ascend_sim.operators.kernel import Kernel, refuse, require, require_dtype, wide

_API = "aclnnRotaryPositionEmbedding"
_MODES = ("half", "interleave")


def _quarter_turn(x: Tensor, mode: str) -> Tensor:
    """(a, b) -> (-b, a) for each pair."""
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def rotary_mul(x: Tensor, cos: Tensor, sin: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    """Return the rotated x in its dtype. rotate: [D, D], in place of the turn."""
    exact = x.to(wide(x.dtype))
    turned = _quarter_turn(exact, rotary_mode) if rotate is None else exact @ rotate.to(exact.dtype)
    return (exact * cos + turned * sin).to(x.dtype)


def rotary_mul_backward(
    dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dcos, dsin), all in the dtype of x."""
    exact, dy = x.to(wide(x.dtype)), dy.to(wide(x.dtype))
    # The turn's transpose is the turn the other way.
    dx = dy * cos - _quarter_turn(dy * sin, rotary_mode)
    dcos, dsin = dy * exact, dy * _quarter_turn(exact, rotary_mode)
    return dx.to(x.dtype), dcos.sum_to_size(cos.shape).to(x.dtype), dsin.sum_to_size(sin.shape).to(x.dtype)


# Where batch, sequence and heads lie.
_LAYOUTS: dict[str, tuple[int, int, int]] = {"BNSD": (0, 2, 1), "BSND": (0, 1, 2), "SBND": (1, 0, 2)}


def _fits(mode: str, shape: torch.Size, table: torch.Size) -> Callable[[str], bool]:
    def fits(layout: str) -> bool:
        batch, sequence, heads = (_LAYOUTS[layout][index] for index in range(3))
        if table[sequence] != shape[sequence]:
            return False
        if mode == "interleave":
            return table[batch] == table[heads] == 1 and shape[batch] * shape[heads] < 1000
        broadcast = {(1, 1), (shape[batch], 1), (shape[batch], shape[heads])}
        return (table[batch], table[heads]) in broadcast and shape[batch] < 1000 and shape[heads] < 1000

    return fits


def _check(x: Tensor, cos: Tensor, sin: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> None:
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        require_dtype(_API, name, tensor)
        require(tensor.dim() == 4, _API, f"The dim of {name} should be 4, but it is {tensor.dim()}.")
        require(tensor.dtype == x.dtype, _API, f"{name} of {tensor.dtype} does not go with x of {x.dtype}.")
    width = x.shape[-1]
    require(rotary_mode in _MODES, _API, f"rotary_mode {rotary_mode!r} is none of {_MODES}.")
    require(width < 896 and width % 2 == 0, _API, f"D should be even and below 896, but it is {width}.")
    require(cos.shape == sin.shape and cos.shape[-1] == width, _API, "cos, sin and x differ in shape.")
    if not any(map(_fits(rotary_mode, x.shape, cos.shape), _LAYOUTS)):
        refuse(
            _API,
            f"rotary_mode {rotary_mode}: x shape {tuple(x.shape)} with cos shape {tuple(cos.shape)} is not supported: "
            f"interleave takes 11SD, 1S1D or S11D and B * N below 1000; half takes B and N below 1000.",
        )


def _check_backward(dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, rotary_mode: str = "half") -> None:
    _check(x, cos, sin, rotary_mode)


KERNELS = (
    Kernel("npu_rotary_mul", rotary_mul, _check),
    Kernel("npu_rotary_mul_backward", rotary_mul_backward, _check_backward),
)
