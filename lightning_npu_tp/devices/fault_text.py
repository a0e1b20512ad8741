"""Error text of HCCL, ACL, torch_npu, NCCL and CUDA -> what it means and what to do; pure functions.

`find_fault` finds the codes of the table in a text, however torch_npu wraps them, and takes the most telling one.
A text without a known code gives None. Whether an error may only say that another rank is gone is decided here as
well, for all who ask. Which rank and which operation failed is found at the boundary, `trainer/explain_error.py`; what
would fit into memory is `estimates/what_fits.py`'s.
`python -m lightning_npu_tp.devices` prints docs/troubleshooting.md.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

from lightning_npu_tp.devices.fault_table import (
    COLLECTIVES,
    ERR_KINDS,
    ERR_MODULES,
    FAULTS,
    HARDWARE,
    MEMORY,
    OPERATORS,
    RUNTIME,
    Fault,
)
from lightning_npu_tp.errors import LightningNPUTPError

# Characters of a long text that are looked at, at its beginning and at its end.
_END = 1 << 15
# A bare number could be a size; after these words it is an error code.
_NUMBERED = r"(?:error code|retcode|ret code|result|return|ret|ErrCode)(?: is)?\s{{0,9}}[:=]?\s{{0,9}}\[?{code}(?!\d)"
_OWN_CODE = re.compile(r"\bERR(\d{2})(\d{3})\b")
_CALLED = (
    re.compile(r"call (aclnn\w{1,200}) failed"),
    # A name ends at a comma or a parenthesis; of some codes the meaning stands there, such as SUSPECT REMOTE ERROR.
    re.compile(r"(?:HCCL|NPU|OPS) function error: (?:\w{1,200}::){0,20}(\w{1,200})(?=[(,])"),
    # Bounded, as each beginning would be looked at to the end of a long text.
    re.compile(r"\btag\[([^\]]{1,200})\]"),
    re.compile(r"the current working operator name is (\w+)"),
)
# How gloo, NCCL, HCCL, the key-value store and Python say that the other side did not answer or is gone. A time-out
# alone may be anybody's: a data loader's, a database's.
_LOST_PEER = re.compile(
    r"\b(socket|client|store|barrier|collective|operation|wait|connect|application)\w*( has)? tim(ed|e)[ -]?out|"
    r"\btim(ed|e)[ -]?out (waiting|after \d+(\.\d+)? ?(ms|s(econds)? (waiting|while))|caused pair closure)|"
    r"connection (closed|reset|refused|was likely closed)|broken ?pipe|socket closed|"
    r"no route to host|(network|host) is unreachable|failed to (recv|send)|remote process|Connection\w*Error|"
    r"Dist(Network|Store|Backend)?Error|[HN]CCL error",
    re.IGNORECASE,
)
# Their texts do not tell whether it was another rank or something of this one.
_EITHER = ("BrokenPipe", "ERR02200")


def find_fault(text: str) -> Fault | None:
    """The most telling fault that an error's text names; None if it names none that is known."""
    found = mentioned(text)
    return found[0] if found else None


def mentioned(text: str) -> list[Fault]:
    """Every fault that the text names, the most telling one first; torch_npu's own ERR codes come last."""
    text = _told(text)
    found = [fault for fault in FAULTS if _pattern(fault).search(text)]
    for module, kind in _OWN_CODE.findall(text):
        own = _own_fault(module, kind)
        if own is not None and own not in found:
            found.append(own)
    return found


def is_communication(fault: Fault) -> bool:
    """Whether the fault is one of collectives, also such as a rank has by itself; a broken pipe may be one."""
    return fault in COLLECTIVES or fault.lost_peer or fault.code in _EITHER


def reads_like_lost_peer(text: str) -> bool:
    """Whether an error may only say that another rank is gone or late, so that the cause is to be looked for there.

    text: "Type: message", without what was added to explain it.
    """
    fault = find_fault(text)
    if fault is not None:
        return fault.lost_peer or fault.code in _EITHER
    return _LOST_PEER.search(_told(text)) is not None


def may_be_lost_peer(error: BaseException) -> bool:
    """Whether this exception may only say so; what this package raises on purpose never does."""
    if isinstance(error, LightningNPUTPError) or not isinstance(error, RuntimeError | ConnectionError):
        return False
    return reads_like_lost_peer(f"{type(error).__name__}: {error}")


def called(text: str) -> str | None:
    """The library function or collective that a text of torch_npu says failed; None if it says none."""
    text = _told(text)
    for pattern in _CALLED:
        if match := pattern.search(text):
            return match.group(1)
    return None


def _told(text: str) -> str:
    """What an error says first and last; a text of megabytes holds dumps in between, and each code is looked for."""
    return text if len(text) <= 2 * _END else f"{text[:_END]}\n{text[-_END:]}"


@cache
def _pattern(fault: Fault) -> re.Pattern[str]:
    code = re.escape(fault.code)
    own = _NUMBERED.format(code=code) if fault.code.isdigit() else rf"\b{code}\b"
    # Codes of letters are words of their own; a title in plain words is found by its pattern alone.
    if not fault.code.isdigit() and fault.pattern:
        return re.compile(fault.pattern, re.IGNORECASE)
    return re.compile(f"{own}|{fault.pattern}" if fault.pattern else own, re.IGNORECASE)


def _own_fault(module: str, kind: str) -> Fault | None:
    """The fault behind ERRmmccc, of which there is one for each module and kind."""
    if module not in ERR_MODULES or kind not in ERR_KINDS:
        return None
    fault = Fault(
        code=f"ERR{module}{kind}",
        title=f"{ERR_MODULES[module]} reports: {ERR_KINDS[kind]}",
        cause="torch_npu's own code says who reports and what kind of error it is, and not why.",
        check="the lines before and after it for a code of HCCL (EI…), of an operator (EZ…) or a number, and the "
        "device's log under ~/ascend/log.",
        lost_peer=kind == "011" and module == "02",
    )
    if kind == "007":
        return replace(
            fault,
            cause="The operator, or a dtype or argument of it, does not exist on this card or in this release of CANN.",
            check="`lightning-npu-tp audit`, which lists the operators of a step that the card does not have.",
            change="`strategy.kernels` chooses the reference for a fused operator.",
        )
    return fault


def troubleshooting() -> str:
    """docs/troubleshooting.md: a section for each fault."""
    parts = [
        "# Troubleshooting",
        "",
        "<!-- Generated: python -m lightning_npu_tp.devices > docs/troubleshooting.md -->",
        "",
        "A run that fails with one of these codes ends with the original error and, below it, the same text with the",
        "rank and the operation. Other errors pass through as they are. Settings are",
        "written as `train.py` takes them; in code they are the arguments of `NPUTensorParallelStrategy` and",
        "`HcclSettings`. None of these was provoked on a card: they are read in torch_npu, in CANN's documentation and",
        "in public reports.",
    ]
    for heading, faults in (
        ("Memory", MEMORY),
        ("Collectives", COLLECTIVES),
        ("Operators", OPERATORS),
        ("Runtime", RUNTIME),
        ("Hardware", HARDWARE),
    ):
        parts += ["", f"## {heading}"]
        for fault in faults:
            parts += ["", f"### {fault.code}: {fault.title}", "", fault.cause, "", f"- Check: {fault.check}"]
            if fault.change:
                parts.append(f"- Change: {fault.change}")
            parts.append(f"- Starting again {fault.restart}.")
    parts += ["", "## ERRmmccc: torch_npu's own codes", "", "Who reports (mm) and what kind of error it is (ccc)."]
    parts += ["", "| mm | who |", "|---|---|", *(f"| {code} | {who} |" for code, who in ERR_MODULES.items())]
    parts += ["", "| ccc | what |", "|---|---|", *(f"| {code} | {what} |" for code, what in ERR_KINDS.items())]
    return "\n".join(parts) + "\n"
