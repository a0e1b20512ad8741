"""What the tests of the fused kernels share: which operators ran, and how far a result is from the exact one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Sums of a few dozen float32 products, through a whole model.
FLOAT32 = 1e-5
# One rounding of a result to bfloat16 is at most 2^-8; a few of them meet in one operation.
BFLOAT16 = 2**-7
# operation of strategy.kernels -> the operators that it stands for
OPERATORS = {
    "grouped_matmul": {"npu_grouped_matmul"},
    "permute": {"npu_moe_token_permute", "_npu_moe_token_unpermute"},
    "swiglu": {"npu_swiglu"},
    "rms_norm": {"npu_rms_norm"},
    "rotary": {"npu_rotary_mul"},
    "attention": {"npu_fusion_attention"},
}
ALL = set().union(*OPERATORS.values())


class Seen(TorchDispatchMode):
    """The operators of torch_npu's own namespace that ran, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    @property
    def names(self) -> set[str]:
        return set(self.calls)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "npu":
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def distance(actual: Tensor, wanted: Tensor) -> float:
    """Relative to the norm of what is wanted; nan where anything is not a number."""
    actual, wanted = (t.detach().cpu().double() for t in (actual, wanted))
    assert actual.shape == wanted.shape
    return float((actual - wanted).norm() / wanted.norm().clamp(min=1e-30))
