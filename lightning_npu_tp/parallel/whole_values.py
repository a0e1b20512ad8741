"""A sharded tensor in a user's expression stands for the whole: its norm, its sum, its product with a plain tensor.

DTensor itself refuses expressions of plain and sharded tensors or of two meshes, gives a DTensor as the sum of a loss
and a norm, and reads the local part where a number is asked for on the host (`weight.norm().item()`), without a word.
Inside `WholeValues` a scalar made of shards is a plain tensor, the same on every rank; sharded tensors beside plain
ones are gathered; for-each functions over a mixture run on each kind. The strategy has every trainer call inside of it.

Collective: every rank of the tensors' mesh must compute the expression.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_npu_tp.parallel.layout import TENSOR_AXIS

# Functions that give numbers to the host.
_READ = frozenset(
    "item tolist numpy __array__ __bool__ __complex__ __contains__ __float__ __index__ __int__".split()
)
# Of Tensor's properties, whose functions are bound to them.
_Accessor = type(Tensor.shape.__get__)


class WholeValues(TorchFunctionMode):
    """While it is active, expressions with DTensors have the values and gradients of whole tensors. Reentrant."""

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if type(func) is _Accessor or not any(_has_shards(value) for value in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name.startswith("_foreach_"):
            return _for_each_kind(func, args, kwargs)
        if name in _READ:
            return func(*_plain(args), **_plain(kwargs))
        if _is_mixture((*args, *kwargs.values())) and not (_writes(name, kwargs) and _has_shards(args[0])):
            return func(*_plain(args), **_plain(kwargs))
        return _without_sharded_scalars(func(*args, **kwargs), args)


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


def _has_shards(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(type(each) is DTensor for each in value)
    return type(value) is DTensor


def _is_mixture(values: tuple[Any, ...]) -> bool:
    """Whether there are DTensors of two meshes, or plain tensors that DTensor does not take for replicated scalars."""
    kinds = set()
    for value in values:
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if type(each) is DTensor:
                kinds.add(each.device_mesh)
            elif isinstance(each, Tensor) and (each.ndim > 0 or each.requires_grad):
                kinds.add(None)
    return len(kinds) > 1


def _writes(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function changes its first argument, which must stay what it is."""
    is_operator = name.startswith("__") and name.endswith("__")
    return name.startswith("__i") or name == "__setitem__" if is_operator else name.endswith("_") or "out" in kwargs


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(each) for each in value)
    return whole(value) if type(value) is DTensor else value


def _without_sharded_scalars(result: Any, args: tuple[Any, ...]) -> Any:
    """The result with plain tensors for scalars that are made of tensors with axes; a scalar's own copy stays sharded."""
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
