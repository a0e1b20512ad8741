"""Count what stalls an accelerator: reads of a tensor on the host, and shapes that depend on values.

Both are invisible on a CPU and dear on a card: the first makes the host wait for the device, the
second does too and recompiles besides. `CountOperators` watches everything that runs inside it,
backward included, and says which line of Python asked. It sees what is dispatched: what a kernel
does within itself stays the kernel's business.
"""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

HOST_SYNC: Literal["host sync"] = "host sync"
DYNAMIC_SHAPE: Literal["dynamic shape"] = "dynamic shape"

# Names without overload. `.item()`, bool(), int(), float() and `if tensor:` end in the first.
_HOST_SYNCS = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::allclose",
    "aten::_linalg_check_errors",
}
_DYNAMIC_SHAPES = {
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::argwhere",
    "aten::masked_select",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::unique_dim_consecutive",
    "aten::bincount",
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
# These read memory without dispatching anything, so they are caught where Python calls them.
_PYTHON_HOST_SYNCS = {
    Tensor.tolist: "Tensor.tolist",
    Tensor.numpy: "Tensor.numpy",
    Tensor.__array__: "Tensor.__array__",
    Tensor.cpu: "Tensor.cpu",
}
# Those written in C: seen where Python calls them, in a backward pass as well, which no function mode reaches.
_UNDISPATCHED = ("tolist", "numpy", "cpu")
# Frames in here, `float64_reference` and the mode of every trainer call included, only pass a call on.
NOT_CALLERS = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parent),
    str(Path(__file__).parents[2] / "parallel" / "whole_values.py"),
)


@dataclass(frozen=True)
class Sighting:
    """One call that stalls: its kind, the operator, and `file:line in function: source` of the caller."""

    kind: Literal["host sync", "dynamic shape"]
    operator: str
    where: str

    @override
    def __str__(self) -> str:
        return f"{self.kind}: {self.operator} at {self.where}"


class CountOperators(TorchDispatchMode):
    """While inside, count every operator and keep a `Sighting` of each that stalls.

    device_type: only calls with a tensor there stall it; None counts those on any device, for runs on a CPU that
        stand for runs on a card.
    counts:    calls by operator name, such as "aten::mm".
    sightings: in the order of the calls.
    """

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self.device_type = device_type
        self.counts: Counter[str] = Counter()
        self.sightings: list[Sighting] = []
        self._python_calls = _PythonCalls(self)

    @override
    def __enter__(self) -> CountOperators:
        self._python_calls.__enter__()
        self._before = sys.getprofile()
        sys.setprofile(self._profile)
        super().__enter__()
        return self

    @override
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        sys.setprofile(self._before)
        self._python_calls.__exit__(kind, error, trace)

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, _, overload = func.name().partition(".")
        self.counts[name] += 1
        kind = stall_kind(name, overload, args, kwargs)
        if kind is not None and (self.device_type is None or any(map(self._is_there, tree_leaves((args, kwargs))))):
            self.record(kind, name)
        return func(*args, **kwargs)

    def _is_there(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == self.device_type

    def _profile(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and getattr(function, "__name__", "") in _UNDISPATCHED:
            tensor = getattr(function, "__self__", None)
            if isinstance(tensor, Tensor) and not self._python_calls.is_passing_on:
                self.record(HOST_SYNC, f"Tensor.{function.__name__}", tensor)

    def record(self, kind: Literal["host sync", "dynamic shape"], operator: str, tensor: Tensor | None = None) -> None:
        """Keep a sighting of `operator`, called by the innermost Python line outside torch and this kit.

        tensor: what is read, where Python calls it.
        """
        if self.device_type is not None and tensor is not None and not self._is_there(tensor):
            return
        self.sightings.append(Sighting(kind, operator, _caller()))

    def found(self, *, exclude: Sequence[str] = ()) -> list[Sighting]:
        """The sightings, except those whose `where` contains one of the texts in `exclude`."""
        return [sighting for sighting in self.sightings if not any(text in sighting.where for text in exclude)]


class _PythonCalls(TorchFunctionMode):
    def __init__(self, counter: CountOperators) -> None:
        super().__init__()
        self.counter = counter
        self.is_passing_on = False

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _PYTHON_HOST_SYNCS.get(func)
        # A device that is another tensor's, `x.to(y.device)`, is no request for the host.
        if func is Tensor.to and "cpu" in (*(arg for arg in args[1:] if isinstance(arg, str)), kwargs.get("device")):
            name = "Tensor.to('cpu')"
        # The methods written in C have been seen before they came here.
        if name is not None and name.removeprefix("Tensor.") not in _UNDISPATCHED:
            self.counter.record(HOST_SYNC, name, args[0])
        self.is_passing_on = name is not None
        try:
            return func(*args, **kwargs)
        finally:
            self.is_passing_on = False


def stall_kind(
    name: str, overload: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Literal["host sync", "dynamic shape"] | None:
    """What kind of stall a call is, if any; name without overload, such as "aten::nonzero"."""
    if name in _HOST_SYNCS:
        return HOST_SYNC
    if name in _DYNAMIC_SHAPES:
        return DYNAMIC_SHAPE
    if name == "aten::repeat_interleave" and overload == "Tensor" and kwargs.get("output_size") is None:
        return DYNAMIC_SHAPE
    if name in _INDEXING and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in (args[1] or ())
    ):
        return DYNAMIC_SHAPE
    return None


def _caller() -> str:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(NOT_CALLERS):
            line = linecache.getline(file, frame.f_lineno).strip()
            return f"{file}:{frame.f_lineno} in {frame.f_code.co_name}: {line}"
        frame = frame.f_back
    return "no Python line"
