"""Faults on purpose: a call of CANN or HCCL that fails, is late or ends the process, an operator that is refused.

In a program, for as long as a block lasts (processes started in it inherit the fault):

    with ascend_sim.inject("HcclAllReduce", code=9, at=3):
        trainer.fit(model)

By environment, for a program as it is; several are joined by `;`:

    ASCEND_SIM_FAULTS="aclrtMemcpyAsync:code=507899,at=3;HcclAllReduce:exit=9,at=2,rank=1"

NAME is a function of the runtime (`aclrt…`) or of HCCL (`Hccl…`), which strikes where the host calls it;
`hccl.HcclAllReduce` and the like, which strike where the card does the work, behind what was queued before it;
`hccl.connect`, this rank does not join a group in time; or an operator as PyTorch names it without its overload
(`aten::nonzero`, `npu::npu_swiglu`); or `stream`, the next operator is accepted and fails while it runs, which the next
call that waits is told, with a code such as 507015. Options, `key=value`:

    code    what the call returns (an operator is refused whatever it is). Default for operators 500002.
    at      the n-th call from 1, counted in each process since the fault was set. Default 1.
    times   for how many calls from there on; 0: for all. Default 1.
    sleep   seconds before the call goes on: a slow link, or a hung one if long.
    exit    end the process with this code, without any clean-up: a dead peer.
    kill    send this signal to the process (9).
    rank    only in the process with this RANK (LOCAL_RANK if there is none).
    device  only where this device is the current one.
    bytes   only allocations of at least this size (aclrtMalloc, aclrtMallocAlign32, aclrtMallocPhysical).
    text    the error text that goes with the code; without `,` and `;`.

Out of memory at a size: `aclrtMalloc:code=207001,bytes=1073741824,times=0`. Expandable segments allocate by
aclrtMallocPhysical, everything else by aclrtMallocAlign32 or aclrtMalloc, so name them all: `OUT_OF_MEMORY`.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from ascend_sim import elf, hook

VARIABLE = "ASCEND_SIM_FAULTS"
NUMBERS = ("code", "at", "times", "sleep", "exit", "kill", "rank", "device", "bytes")
OUT_OF_MEMORY = ("aclrtMalloc", "aclrtMallocAlign32", "aclrtMallocPhysical")
OPERATOR_REFUSED = 500002
# An operator that is accepted and fails while it runs.
STREAM = "stream"


class UnknownCall(ValueError):
    """A fault names what no call has; the text gives near names."""


@contextlib.contextmanager
def inject(name: str, *, text: str | None = None, **options: float) -> Iterator[None]:
    """Set a fault for a block, in this process and in those that it starts. Options as in the module's text.

    Raises UnknownCall, and ValueError for an option that does not exist.
    """
    fault = spell(name, text=text, **options)
    runtime = hook.library("ascendcl")
    before = os.environ.get(VARIABLE)
    number = runtime.ascend_sim_add_fault(fault.encode())
    os.environ[VARIABLE] = f"{before};{fault}" if before else fault
    try:
        yield
    finally:
        runtime.ascend_sim_remove_fault(number)
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


def spell(name: str, *, text: str | None = None, **options: float) -> str:
    """The fault as the environment spells it, checked."""
    _check_name(name)
    for key in options:
        if key not in NUMBERS:
            raise ValueError(f"A fault has no option {key!r}; there are {', '.join((*NUMBERS, 'text'))}.")
    if "::" in name:
        options.setdefault("code", OPERATOR_REFUSED)
    if not options.keys() & {"code", "sleep", "exit", "kill"}:
        raise ValueError(f"The fault in {name} does nothing: give it a code, sleep, exit or kill.")
    parts = [f"{key}={value:g}" if key == "sleep" else f"{key}={int(value)}" for key, value in options.items()]
    if text is not None:
        if set(text) & set(",;"):
            raise ValueError(f"The text of a fault must be without `,` and `;`, and {text!r} is not.")
        parts.append(f"text={text}")
    return f"{name}:{','.join(parts)}"


def check_environment() -> None:
    """Raise UnknownCall or ValueError if the variable names what does not exist."""
    for fault in filter(None, os.environ.get(VARIABLE, "").split(";")):
        name, options = _split(fault)
        pairs = dict(part.partition("=")[::2] for part in filter(None, options.split(",")))
        text = pairs.pop("text", None)
        try:
            spell(name, text=text, **{key: float(value) for key, value in pairs.items()})
        except UnknownCall:
            raise
        except ValueError as error:
            raise ValueError(f"{VARIABLE} holds {fault!r}: {error}") from error


def known_calls() -> list[str]:
    """The functions of the simulated runtime and HCCL that a fault can name."""
    found: set[str] = set()
    for library in ("ascendcl", "hccl"):
        path = Path(os.environ[hook.LIBRARIES]) / f"lib{library}.so"
        found.update(name for name in elf.symbols(path).defined if name.startswith(("acl", "Hccl")))
    return sorted(found)


def _split(fault: str) -> tuple[str, str]:
    namespace, colons, rest = fault.partition("::")
    if colons:
        name, _, options = rest.partition(":")
        return f"{namespace}::{name}", options
    name, _, options = fault.partition(":")
    return name, options


def _check_name(name: str) -> None:
    if name == STREAM:
        return
    known = known_calls()
    if name.startswith("hccl."):
        known = ["hccl.connect", *(f"hccl.{call}" for call in known if call.startswith("Hccl"))]
    if "::" in name:
        # Torch is asked where it is there already; `after_torch_npu` asks again what could not be asked before.
        if "torch_npu" not in sys.modules:
            return
        dispatch_names = sys.modules["torch"]._C._dispatch_get_all_op_names()
        known = sorted({operator.partition(".")[0] for operator in dispatch_names})
        known = [operator for operator in known if operator.startswith(("aten::", "npu::"))]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f" Near are {', '.join(near)}." if near else ""
        raise UnknownCall(f"No call of the simulated card is named {name!r}.{hint}")
