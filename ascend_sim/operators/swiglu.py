"""npu_swiglu: silu(first half) * second half of one dimension.

Source: torch_npu/_op_plugin_docs.py; an empty tensor is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_sim.operators.kernel import Kernel, require, require_dtype, wide

_API = "aclnnSwiGlu"


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """Return half as many elements along `dim`, in the dtype of x."""
    gate, up = x.to(wide(x.dtype)).chunk(2, dim)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def swiglu_backward(dy: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    """Return the gradient of x."""
    gate, up = x.to(wide(x.dtype)).chunk(2, dim)
    dy, sigmoid = dy.to(gate.dtype), torch.sigmoid(gate)
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((dgate, dy * gate * sigmoid), dim).to(x.dtype)


def _check(x: Tensor, dim: int = -1) -> None:
    require_dtype(_API, "x", x)
    require(1 <= x.dim() <= 8, _API, f"The dim of x should be in [1,8], but it is {x.dim()}.")
    require(x.numel() > 0, _API, f"x shape {tuple(x.shape)} is empty, which is not supported.")
    require(x.shape[dim] % 2 == 0, _API, f"x shape {tuple(x.shape)} cannot be halved along dim {dim}.")


def _check_backward(dy: Tensor, x: Tensor, dim: int = -1) -> None:
    _check(x, dim)


KERNELS = (
    Kernel("npu_swiglu", swiglu, _check),
    Kernel("npu_swiglu_backward", swiglu_backward, _check_backward),
)
