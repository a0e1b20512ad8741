"""What in a training step would stall an Ascend card, and who asked for it.

`Recorder` watches a step that runs on the CPU and holds every operator against the operator table and the limits
kept beside it (`operators/`). It notes the line of Python, the module and the number of calls; for what autograd
runs by itself, the line of the forward pass whose gradient it is. It runs nothing: `audit_run.py` does, and the
command `lightning-npu-tp audit` prints. What happens inside a kernel of torch_npu stays the kernel's business.
"""

from __future__ import annotations

import linecache
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_npu_tp.tools.operators import operator_table
from lightning_npu_tp.tools.operators.limits import (
    CPU_ONLY,
    DYNAMIC,
    FLOAT64,
    KINDS,
    NOT_KERNELS,
    ONE_HOT,
    ONE_KERNEL,
    REPEAT,
    REPEAT_ELEMENTS,
    SYNC,
    Kind,
    Limit,
    fallback,
    limits_of,
    limits_of_result,
    stall,
    tensors_in,
)
from lightning_npu_tp.tools.testing.operators import NOT_CALLERS, CountOperators, stall_kind

_PACKAGE = Path(__file__).parents[1]
_SKIPPED = (*NOT_CALLERS, __file__, "<")
_ENGINE = str(Path(torch.__file__).parent / "autograd" / "graph.py")
# The one read on the host that is meant to be: the receive buffers of an exchange need their sizes.
_BY_DESIGN = (str(_PACKAGE / "models" / "moe" / "dispatch.py"), "_exchange_counts")
_WHY_BY_DESIGN = "by design: an all-to-all exchange reads its row counts once per layer and forward pass"


@dataclass(frozen=True)
class Place:
    """Who asked for an operator: file, line, function and source line; module path; whether for a gradient."""

    file: str
    line: int
    function: str
    module: str = ""
    backward: bool = False

    @property
    def source(self) -> str:
        """The source line that asked, without its indentation."""
        return linecache.getline(self.file, self.line).strip()


@dataclass
class Finding:
    """All calls of one operator from one line that share a fault.

    modules: paths in the model, in the order of the calls. count: calls in the step, on the rank with the most.
    allowed: why it does not count, "" if it does.
    """

    kind: Kind
    operator: str
    why: str
    instead: str
    source: str
    place: Place
    modules: list[str] = field(default_factory=list)
    count: int = 0
    allowed: str = ""

    @property
    def where(self) -> str:
        """file:line, the file from its package on."""
        return f"{short_path(self.place.file)}:{self.place.line}"

    def as_json(self) -> dict[str, Any]:
        """The finding as plain data, its place included."""
        place = {**asdict(self.place), "code": self.place.source}
        place.pop("module")
        return {**asdict(self), "place": place, "where": self.where}


@dataclass(frozen=True)
class _Sighting:
    limit: Limit
    operator: str
    place: Place


def short_path(file: str) -> str:
    """A file's path from its package, or from the working folder, on."""
    for root in ("site-packages/", f"{Path.cwd()}/", f"{_PACKAGE.parent}/"):
        if root in file:
            return file.rpartition(root)[2]
    return file


class Recorder(CountOperators):
    """While inside, keeps what an Ascend card would stall at; `findings` tells.

    root: the module that is trained, for the paths. Nothing is computed differently.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root
        self._table = operator_table()
        self._seen: list[_Sighting] = []
        self._origins: dict[int, Place] = {}
        self._calls: Counter[str] = Counter()
        self._names: dict[int, str] = {}
        # Tensors that lie on the host on a card's machine too: reading them waits for nothing.
        self._on_host: dict[int, Any] = {}
        self._functions = _Functions(self)
        self.is_one_kernel = False
        self._within: list[str] = []

    @override
    def __enter__(self) -> Recorder:
        self._names = {id(module): name for name, module in self.root.named_modules()}
        self._note_wide_parameters()
        self._hook = register_module_forward_pre_hook(self._count_call)
        self._functions.__enter__()
        super().__enter__()
        return self

    @override
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._functions.__exit__(kind, error, trace)
        self._hook.remove()

    def _note_wide_parameters(self) -> None:
        for name, tensor in (*self.root.named_parameters(), *self.root.named_buffers()):
            if tensor.dtype == torch.float64:
                owner = self.root.get_submodule(name.rpartition(".")[0])
                code = type(owner).forward.__code__
                place = Place(code.co_filename, code.co_firstlineno, code.co_name, name)
                self._seen.append(_Sighting(FLOAT64, "parameter or buffer", place))

    def _count_call(self, module: nn.Module, _: Any) -> None:
        # A second run for recomputed activations has remembered what the first one read.
        if torch._C._current_autograd_node() is None and id(module) in self._names:
            self._calls[self._names[id(module)]] += 1

    # --- what is called ------------------------------------------------------------------------

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, _, overload = func.name().partition(".")
        self.counts[name] += 1
        if torch.is_grad_enabled() or torch._C._current_autograd_node() is None:
            self._note_origin()
        inputs = list(tensors_in((*args, *kwargs.values())))
        whole = any(type(tensor) not in (Tensor, nn.Parameter) for tensor in inputs)
        found = [] if self.is_one_kernel else list(self._limits(func, name, overload, args, kwargs))
        if found or whole or self.is_one_kernel or not self._is_composite(func, name):
            result = func(*args, **kwargs)
        else:
            # torch builds it from others, which go to the card one by one: watch those.
            with self._watching(name), torch.no_grad():
                result = func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        results = list(tensors_in(result))
        if not self.is_one_kernel:
            found += limits_of_result(name, inputs, results, is_view=func.is_view)
        if found:
            place = self._place()
            self._seen += [_Sighting(limit, func.name(), place) for limit in found]
        if inputs and all(self.is_on_host(tensor) for tensor in inputs):
            for tensor in results:
                self.put_on_host(tensor)
        return result

    @contextmanager
    def _watching(self, name: str) -> Iterator[None]:
        self._within.append(name)
        TorchDispatchMode.__enter__(self)
        try:
            yield
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)
            self._within.pop()

    def _limits(
        self, func: Any, name: str, overload: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[Limit]:
        kind = stall_kind(name, overload, args, kwargs)
        if kind == DYNAMIC:
            yield stall(DYNAMIC, name)
        elif kind == SYNC and not all(self.is_on_host(tensor) for tensor in tensors_in(args)):
            yield stall(SYNC, name)
        yield from limits_of(name, args, kwargs)
        if name.partition("::")[0] not in NOT_KERNELS:
            full = CPU_ONLY.get(name) or func.name()
            how = self._table.of(full)
            if how in ("fallback", "neither"):
                yield fallback(full, how)

    def _is_composite(self, func: Any, name: str) -> bool:
        # Some composites call themselves, for a device that they know.
        if name in self._within or name.partition("::")[0] in NOT_KERNELS:
            return False
        return self._table.of(func.name()) == "explicit" and func.has_kernel_for_dispatch_key(
            torch._C.DispatchKey.CompositeExplicitAutograd
        )

    @override
    def record(self, kind: Any, operator: str, tensor: Tensor | None = None) -> None:
        """Keep a call that the kit has seen where Python made it: .cpu(), .tolist(), .numpy()."""
        if tensor is None or not self.is_on_host(tensor):
            self.note(stall(kind, operator), operator)

    def note(self, limit: Limit, operator: str) -> None:
        """Keep a call that runs into a limit."""
        self._seen.append(_Sighting(limit, operator, self._place()))

    # --- the host ------------------------------------------------------------------------------

    def is_on_host(self, tensor: Tensor) -> bool:
        """Whether a tensor would lie on the host although the model is on a card."""
        known = self._on_host.get(id(tensor))
        return known is not None and known() is tensor

    def put_on_host(self, tensor: Tensor) -> None:
        """Note that a tensor would lie on the host although the model is on a card."""
        self._on_host[id(tensor)] = weakref.ref(tensor)

    # --- who asked -----------------------------------------------------------------------------

    def _place(self) -> Place:
        """The innermost line of Python outside torch and this kit, and the innermost module around it."""
        frame: FrameType | None = sys._getframe(1)
        line: Place | None = None
        module: str | None = None
        node = torch._C._current_autograd_node()
        while frame is not None and (line is None or module is None):
            code = frame.f_code
            if node is not None and code.co_filename == _ENGINE and code.co_name == "_engine_run_backward":
                # Further out is whoever called backward(), which says nothing.
                origin = self._origins.get(node._sequence_nr())
                if line is None:
                    line = origin or Place("", 0, f"backward of {node.name()}")
                    return replace(line, backward=True)
                return replace(line, module=origin.module if origin else "", backward=True)
            if line is None and not code.co_filename.startswith(_SKIPPED):
                line = Place(code.co_filename, frame.f_lineno, code.co_name, backward=node is not None)
            if module is None:
                module = self._module_of(frame.f_locals.get("self"))
            frame = frame.f_back
        return replace(line or Place("", 0, "no Python line"), module=module or "")

    def _module_of(self, owner: Any) -> str | None:
        if isinstance(owner, torch.optim.Optimizer):
            return type(owner).__name__
        return self._names.get(id(owner)) if isinstance(owner, nn.Module) else None

    def _note_origin(self) -> None:
        # autograd made the node of this call just now, with the last number; calls that follow may make none. An
        # autograd.Function has its node before its forward runs, without gradients.
        number = torch.autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]
        if number not in self._origins:
            self._origins[number] = self._place()

    # --- the answer ----------------------------------------------------------------------------

    def findings(self, allow: Sequence[str] = ()) -> list[Finding]:
        """What was seen, calls from one line together; allow: patterns of operators or places that do not count."""
        found: dict[tuple[Any, ...], Finding] = {}
        designed: Counter[str] = Counter()
        for sighting in self._seen:
            limit, place, allowed = sighting.limit, sighting.place, ""
            if limit.kind == SYNC and (place.file, place.function) == _BY_DESIGN and not place.backward:
                designed[place.module] += 1
                if designed[place.module] <= max(1, self._calls[place.module]):
                    allowed = _WHY_BY_DESIGN
            names = (sighting.operator, sighting.operator.partition(".")[0], f"{short_path(place.file)}:{place.line}")
            for pattern in allow:
                if any(fnmatchcase(name, pattern) for name in names):
                    allowed = f"--allow {pattern}"
            key = (limit.kind, limit.why, sighting.operator, place.file, place.line, place.backward, allowed)
            finding = found.setdefault(
                key,
                Finding(limit.kind, sighting.operator, limit.why, limit.instead, limit.source, place, allowed=allowed),
            )
            finding.count += 1
            if place.module not in finding.modules:
                finding.modules.append(place.module)
        return sorted(found.values(), key=lambda finding: KINDS.index(finding.kind))


class _Functions(TorchFunctionMode):
    """Notes tensors that are made on the host, and functions that a card runs as one kernel."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        recorder = self.recorder
        if func in ONE_KERNEL:
            if (
                func is torch.nn.functional.one_hot
                and (args[1] if len(args) > 1 else kwargs.get("num_classes", -1)) < 0
            ):
                recorder.note(ONE_HOT, "aten::one_hot")
            recorder.is_one_kernel = True
            try:
                return func(*args, **kwargs)
            finally:
                recorder.is_one_kernel = False
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            if _asks_for_host(func, args, kwargs):
                recorder.put_on_host(result)
            if func in (torch.repeat_interleave, Tensor.repeat_interleave) and result.numel() >= REPEAT_ELEMENTS:
                recorder.note(REPEAT, "aten::repeat_interleave")
        return result


def _asks_for_host(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if func in _device_constructors():
        # By the text only: another tensor's device reads "cpu" here and would be the card.
        device = kwargs.get("device")
        return device is None or (isinstance(device, str) and device == "cpu")
    texts = [value for value in (*args[1:], kwargs.get("device")) if isinstance(value, str)]
    return func is Tensor.cpu or (func is Tensor.to and "cpu" in texts)


def merge(ranks: Iterable[Sequence[Finding]]) -> list[Finding]:
    """Findings of several ranks as one list: what any of them has, with the largest count."""
    found: dict[tuple[Any, ...], Finding] = {}
    for findings in ranks:
        for finding in findings:
            place = replace(finding.place, module="")
            key = (finding.kind, finding.operator, finding.why, finding.allowed, place)
            known = found.setdefault(key, finding)
            known.count = max(known.count, finding.count)
            known.modules += [module for module in finding.modules if module not in known.modules]
    return sorted(found.values(), key=lambda finding: KINDS.index(finding.kind))
