"""Casts and copies that torch_npu issues under names of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_sim.operators.kernel import Kernel


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in another dtype."""
    return x.to(dtype)


def copy_memory_(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Overwrite `x`."""
    return x.copy_(source)


def one_(x: Tensor) -> Tensor:
    """Fill with ones."""
    return x.fill_(1)


KERNELS = (
    Kernel("_npu_dtype_cast", cast),
    Kernel("_npu_dtype_cast_backward", cast),
    Kernel("copy_memory_", copy_memory_, inplace=True),
    Kernel("one_", one_, inplace=True),
)
