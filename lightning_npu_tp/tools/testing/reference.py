"""A true float64 reference out of a model that insists on float32, and how far a result is from it.

transformers asks for float32 by name in its norms, router, rotary embedding and loss, so that a
`.double()` model still rounds to 2e-7. Inside `float64_reference()` every such request means
float64; then a sharded layout can be compared at 1e-10, where a real mistake has nowhere to hide.
A test's tool: training never runs under it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

_WIDER = {
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
    "torch.FloatTensor": "torch.DoubleTensor",
    torch.FloatTensor: torch.DoubleTensor,
}
_WIDER_METHODS: dict[Any, Callable[..., Any]] = {
    Tensor.float: Tensor.double,
    # torch declares these two for no type checker.
    Tensor.cfloat: Tensor.cdouble,  # type: ignore[attr-defined]
}


class _WiderMode(TorchFunctionMode):
    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args = tuple(_wider(arg) for arg in args)
        kwargs = {name: _wider(arg) for name, arg in (kwargs or {}).items()}
        func = _WIDER_METHODS.get(func, func)
        return func(*args, **kwargs)


def _wider(argument: Any) -> Any:
    if isinstance(argument, (torch.dtype, str, type)):
        return _WIDER.get(argument, argument)
    return argument


@contextmanager
def float64_reference() -> Iterator[None]:
    """Turn every request for float32 into float64 (complex64 into complex128) while inside.

    Covers dtype arguments, `.float()`, `.type(...)`, `Module.float()`, and the default dtype, so that a
    model built inside has float64 parameters and buffers. Build the model, run its forward and its
    backward inside. Tensors that are float32 already stay float32: convert them first.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _WiderMode():
            yield
    finally:
        torch.set_default_dtype(default)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`, both in float64; NaN and infinity give infinity.

    actual, expected: the same shape, any dtype. An expected zero gives 0 if `actual` is zero, else a
    huge number. Raises AssertionError for different shapes.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    wide = torch.complex128 if actual.is_complex() or expected.is_complex() else torch.float64
    actual, expected = actual.detach().to("cpu", wide), expected.detach().to("cpu", wide)
    distance = torch.linalg.vector_norm(actual - expected).item()
    size = torch.linalg.vector_norm(expected).item()
    if not math.isfinite(distance) or not math.isfinite(size):
        return math.inf
    return distance / max(size, torch.finfo(torch.float64).tiny)


def assert_close_relative(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> float:
    """Assert that `relative_difference` is at most `tolerance`; `what` names the quantity. Returns the difference."""
    difference = relative_difference(actual, expected)
    assert difference <= tolerance, (
        f"{what}: relative difference {difference:.3g} exceeds {tolerance:.3g} (shape {tuple(expected.shape)}, "
        f"norm {expected.detach().double().norm().item():.6g})"
    )
    return difference
