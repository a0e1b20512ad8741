"""A sharded tensor in a user's expression stands for the whole: its norm, its sum, its product with a plain tensor.

DTensor itself refuses expressions of plain and sharded tensors or of two meshes, gives a DTensor as the sum of a loss
and a norm, and reads the local part where a number is asked for on the host (`weight.norm().item()`), without a word.
Inside `WholeValues` a scalar made of shards is a plain tensor, the same on every rank; sharded tensors beside plain
ones are gathered; for-each functions over a mixture run on each kind. The strategy has every trainer call inside of it,
but for the forward of a converted model.

Collective: every rank of the tensors' mesh must compute the expression.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodWrapperType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from typing_extensions import override

from lightning_npu_tp.parallel.layout import TENSOR_AXIS

# Functions that give numbers to the host.
_READ = frozenset("item tolist numpy __array__ __bool__ __complex__ __contains__ __float__ __index__ __int__".split())


# Methods that are about the tensor object and compute nothing of it.
_ABOUT_ITSELF = frozenset(
    "register_hook register_post_accumulate_grad_hook backward __deepcopy__ __reduce_ex__ __repr__ __format__".split()
)


class WholeValues(TorchFunctionMode):
    """While it is active, expressions with DTensors have the values and gradients of whole tensors. Reentrant."""

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Tensor's properties are asked by such a wrapper, and often.
        if type(func) is MethodWrapperType or not any(_has_shards(value) for value in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name.startswith("_foreach_"):
            return _for_each_kind(func, args, kwargs)
        if name in _READ:
            return func(*_plain(args), **_plain(kwargs))
        if _writes(name, kwargs) or name in _ABOUT_ITSELF:
            return func(*args, **kwargs)
        if _is_mixture((*args, *kwargs.values())) or (torch.is_grad_enabled() and _is_max_norm(args, kwargs)):
            return func(*_plain(args), **_plain(kwargs))
        if torch.is_grad_enabled():
            args = tuple(map(_aligned, args))
        return _without_sharded_scalars(func(*args, **kwargs), args)


@contextmanager
def paused() -> Iterator[None]:
    """Leave `WholeValues` for code that computes on local parts, where it would cost a microsecond an operation.

    Not where the code of a user's has entered another mode of torch's inside of it.
    """
    mode = _get_current_function_mode()
    if not isinstance(mode, WholeValues):
        yield
        return
    mode.__exit__(None, None, None)
    try:
        yield
    finally:
        mode.__enter__()


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, plain, the same on every rank; a plain tensor is returned as it is. Collective.

    Gradient: each rank's part of the mean over the data ranks, whose losses training averages as well.
    """
    return _Whole.apply(tensor) if isinstance(tensor, DTensor) else tensor


class _Whole(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, tensor: DTensor) -> Tensor:
        ctx.mesh, ctx.placements = tensor.device_mesh, tensor.placements
        return tensor.full_tensor().view(tensor.shape)

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> DTensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        names = ctx.mesh.mesh_dim_names or ("",) * ctx.mesh.ndim
        for axis, name in enumerate(names):
            # Tensor ranks compute the same from the same tokens.
            if name != TENSOR_AXIS and ctx.mesh.size(axis) > 1:
                dist.all_reduce(gradient, group=ctx.mesh.get_group(axis))
                gradient /= ctx.mesh.size(axis)
        everywhere = [Replicate()] * ctx.mesh.ndim
        placements = [Replicate() if placement.is_partial() else placement for placement in ctx.placements]
        return DTensor.from_local(gradient, ctx.mesh, everywhere, run_check=False).redistribute(placements=placements)


def _aligned(value: Any) -> Any:
    """A parameter whose gradient will have the parameter's placements; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_aligned, value)) if _has_shards(value) else value
    return _Aligned.apply(value) if type(value) is DTensor and value.requires_grad and value.is_leaf else value


class _Aligned(torch.autograd.Function):
    """DTensor's gradient of a mean is replicated and that of a variance partial; FSDP and optimizers want shards."""

    @staticmethod
    @override
    def forward(ctx: Any, parameter: DTensor) -> Tensor:
        ctx.placements = parameter.placements
        return parameter.view_as(parameter)

    @staticmethod
    @override
    def backward(ctx: Any, gradient: DTensor) -> DTensor:
        return gradient if gradient.placements == ctx.placements else gradient.redistribute(placements=ctx.placements)


def _has_shards(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(type(each) is DTensor for each in value)
    return type(value) is DTensor


def _is_mixture(values: tuple[Any, ...]) -> bool:
    """Whether there are DTensors of two meshes, or plain tensors that DTensor does not take for replicated scalars."""
    kinds: set[DeviceMesh | None] = set()
    for value in values:
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if type(each) is DTensor:
                kinds.add(each.device_mesh)
            elif isinstance(each, Tensor) and (each.ndim > 0 or each.requires_grad):
                kinds.add(None)
    return len(kinds) > 1


def _is_max_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a norm is asked for whose gradient is NaN, or a hang, by DTensor's own formula (torch 2.13)."""
    orders = (*args[1:], *kwargs.values())
    return (
        type(args[0]) is DTensor
        and args[0].requires_grad
        and any(isinstance(order, float) and math.isinf(order) for order in orders)
    )


def _writes(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function changes its first argument, which must stay what it is."""
    is_operator = name.startswith("__") and name.endswith("__")
    if is_operator:
        return name.startswith("__i") or name == "__setitem__"
    return name.endswith("_") or kwargs.get("out") is not None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(each) for each in value)
    return whole(value) if type(value) is DTensor else value


def _without_sharded_scalars(result: Any, args: tuple[Any, ...]) -> Any:
    """The result with plain tensors for scalars made of tensors that have axes; a scalar's own copy stays sharded."""
    if type(result) is DTensor and result.ndim == 0:
        return result if all(each.ndim == 0 for each in args if type(each) is DTensor) else whole(result)
    if type(result) in (list, tuple):
        return type(result)(_without_sharded_scalars(each, args) for each in result)
    return result


def _for_each_kind(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A for-each function, run on the tensors of each mesh and on the plain ones; results in the order of the lists."""
    tensors = args[0]
    places: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        places.setdefault(tensor.device_mesh if type(tensor) is DTensor else None, []).append(index)
    results: list[Any] = [None] * len(tensors)
    for indices in places.values():

        def of_kind(value: Any, indices: list[int] = indices) -> Any:
            is_list = isinstance(value, (list, tuple)) and len(value) == len(tensors)
            return [value[index] for index in indices] if is_list else value

        found = func(*map(of_kind, args), **{key: of_kind(value) for key, value in kwargs.items()})
        for index, result in zip(indices, found or (), strict=False):
            results[index] = _without_sharded_scalars(result, (tensors[index],))
    return results
