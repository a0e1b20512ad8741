"""npu_rms_norm: x / sqrt(mean(x^2) + epsilon) * gamma over the dimensions of gamma; y in the dtype of x.

Source: torch_npu/_op_plugin_docs.py; dgamma in float32 as in the wheel's meta kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_sim.operators.kernel import Kernel, require, require_dtype, wide

_API, _GRAD_API = "aclnnRmsNorm", "aclnnRmsNormGrad"


def _normed_dims(x: Tensor, gamma: Tensor) -> list[int]:
    return list(range(x.dim() - gamma.dim(), x.dim()))


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return (y, rstd); rstd keeps the normalised dimensions as 1, in at least float32."""
    exact = x.to(wide(x.dtype))
    rstd = torch.rsqrt(exact.square().mean(_normed_dims(x, gamma), keepdim=True) + epsilon)
    return (exact * rstd * gamma.to(exact.dtype)).to(x.dtype), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dx, dgamma)."""
    normed = x.to(rstd.dtype) * rstd
    dnormed = dy.to(rstd.dtype) * gamma.to(rstd.dtype)
    dx = rstd * (dnormed - normed * (dnormed * normed).mean(_normed_dims(x, gamma), keepdim=True))
    return dx.to(x.dtype), (dy.to(rstd.dtype) * normed).sum_to_size(gamma.shape)


def _check(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> None:
    require_dtype(_API, "x", x)
    require_dtype(_API, "gamma", gamma)
    require(1 <= x.dim() <= 8, _API, f"The dim of x should be in [1,8], but it is {x.dim()}.")
    require(
        gamma.dtype == x.dtype or (x.dtype, gamma.dtype) == (torch.bfloat16, torch.float32),
        _API,
        f"gamma of {gamma.dtype} does not go with x of {x.dtype}: the same, or float32 with bfloat16.",
    )
    require(
        x.shape[x.dim() - gamma.dim() :] == gamma.shape,
        _API,
        f"gamma shape {tuple(gamma.shape)} is not the last dimensions of x shape {tuple(x.shape)}.",
    )


KERNELS = (
    Kernel("npu_rms_norm", rms_norm, _check),
    Kernel("npu_rms_norm_backward", rms_norm_backward),
)
