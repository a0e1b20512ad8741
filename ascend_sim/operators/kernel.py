"""How a reference kernel gets at the memory of the simulated card, and how a refusal reads.

Device memory lies in this process, so a kernel computes on CPU tensors that name the same bytes, after the
current stream has caught up. Nothing is copied to the host and no value is asked of the device: the counters
of copies and synchronisations show what the program did, not what the simulation did.
"""

from __future__ import annotations

import ctypes
import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ascend_sim import hook
from ascend_sim.faults import OPERATOR_REFUSED

_FLOAT64 = os.environ.get("ASCEND_SIM_FLOAT64") == "1"
# The kernels' floating dtypes: a card's, and float64 where `install` was asked for it. It is decided before torch_npu
# is imported, and with it this module.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, *((torch.float64,) if _FLOAT64 else ()))


@dataclass(frozen=True)
class Kernel:
    """One operator of the `npu` namespace.

    name:     with its overload, e.g. "npu_grouped_matmul.List".
    compute:  takes and returns CPU tensors; allocates its results.
    check:    takes the same arguments; raises what the card would raise (`refuse`). None accepts everything.
    inplace:  the first argument is written and returned.
    hands_on: an argument among the results is that tensor itself, and not a copy.
    """

    name: str
    compute: Callable[..., Any]
    check: Callable[..., None] | None = None
    inplace: bool = False
    hands_on: bool = False


class Refused(RuntimeError):
    """The arguments are outside of what the operator documents; the text has the form of torch_npu's own."""


def refuse(api: str, reason: str) -> None:
    """Raise what torch_npu raises when CANN turns the arguments of `api` down (EZ1001, ERR01100)."""
    now = time.strftime("%Y-%m-%d-%H:%M:%S")
    raise Refused(
        f"call {api} failed, detail:EZ1001: [PID: {os.getpid()}] {now} {reason}\n\n"
        f"[ERROR] {now} (PID:{os.getpid()}, Device:0, RankID:{os.environ.get('RANK', '-1')}) "
        f"ERR01100 OPS call acl api failed"
    )


def require(condition: bool, api: str, reason: str) -> None:
    """Raise the simulator's error with this text unless the condition holds."""
    if not condition:
        refuse(api, reason)


def require_dtype(api: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype] = FLOATS) -> None:
    """Refuse a tensor of another dtype."""
    require(
        tensor.dtype in allowed,
        api,
        f"Tensor {name} not implemented for {_acl_name(tensor.dtype)}, should be in dtype support list "
        f"[{','.join(map(_acl_name, allowed))},].",
    )


def _acl_name(dtype: torch.dtype) -> str:
    names = {torch.float32: "DT_FLOAT", torch.float64: "DT_DOUBLE"}
    return names.get(dtype, f"DT_{str(dtype).removeprefix('torch.').upper()}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a kernel computes in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def uninitialised(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory that nobody wrote: NaN."""
    return like.new_full(tuple(shape), torch.nan)


def is_transposed(matrix: Tensor) -> bool:
    """Whether the last two dimensions lie in memory the other way round, as CANN decides it."""
    rows, columns = matrix.shape[-2:]
    return matrix.stride(-2) == 1 and matrix.stride(-1) == rows and not (rows == 1 and columns == 1)


def on_host(tensor: Tensor) -> Tensor:
    """A CPU tensor over the same bytes; a tensor of the CPU is its own."""
    if tensor.device.type == "cpu":
        return tensor
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=storage.nbytes() // tensor.dtype.itemsize)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def on_device(result: Any, device: torch.device) -> Any:
    """The result in memory of the card; numbers pass."""
    if not isinstance(result, Tensor) or result.device == device:
        return result
    placed = torch.empty(result.shape, dtype=result.dtype, device=device)
    if placed.numel():
        on_host(placed).copy_(result)
    return placed


def _refused(name: str) -> str:
    """What torch_npu says of an operator that CANN cannot compile (500002)."""
    now = time.strftime("%Y-%m-%d-%H:%M:%S")
    return (
        f"operator():../torch_npu/csrc/framework/OpParamMaker.cpp:348 OPS function error: {name}, "
        f"error code is {OPERATOR_REFUSED}\n"
        f"[ERROR] {now} (PID:{os.getpid()}, Device:0, RankID:{os.environ.get('RANK', '-1')}) "
        "ERR01100 OPS call acl api failed\n[Error]: A GE error occurs in the system.\n"
        "        Rectify the fault based on the error information in the ascend log."
    )


def _enter(name: str, reads: Sequence[Tensor]) -> None:
    # Any operator of the card waits for what was queued before it on the current stream, and may be refused.
    if hook.library("ascendcl").ascend_sim_fault(name.encode()):
        raise RuntimeError(_refused(name.removeprefix("npu::")))
    torch.ops.ascend_sim.before_kernel(name, reads, [])


def _kernel(kernel: Kernel) -> Callable[..., Any]:
    name = f"npu::{kernel.name.partition('.')[0]}"

    @functools.wraps(kernel.compute)
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        device = tensors[0].device
        if kernel.check is not None:
            kernel.check(*args, **kwargs)
        _enter(name, tensors)
        hosts = [on_host(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        host_args, host_kwargs = pytree.tree_unflatten(hosts, spec)
        # The host's tensors are new ones that need no gradient, so nothing here is recorded.
        result = kernel.compute(*host_args, **host_kwargs)
        own = {id(host): leaf for host, leaf in zip(hosts, leaves, strict=True)} if kernel.hands_on else {}

        def place(value: Any) -> Any:
            return own[id(value)] if id(value) in own else on_device(value, device)

        result = args[0] if kernel.inplace else pytree.tree_map(place, result)
        torch.ops.ascend_sim.before_kernel(name, [], [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)])
        return result

    return run


_library: list[torch.library.Library] = []


def install(kernels: Sequence[Kernel]) -> None:
    """Register the kernels for the npu device in place of the wheel's own, which call CANN."""
    if _library:
        return
    library = torch.library.Library("npu", "IMPL")
    for kernel in kernels:
        library.impl(kernel.name, _kernel(kernel), "PrivateUse1", allow_override=True)
    _library.append(library)
