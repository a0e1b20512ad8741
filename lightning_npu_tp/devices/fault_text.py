"""Error text of HCCL, ACL, torch_npu, NCCL and CUDA -> what it means and what to do; pure functions.

`explain` finds the codes of the table in a text, however torch_npu wraps them, and takes the most telling one.
A text without a known code gives None, and its error stays what it is. Which rank and which operation failed is
found at the boundary, `trainer/explain_device.py`; what would fit into memory is `estimates/what_fits.py`'s.
`python -m lightning_npu_tp.devices` prints docs/troubleshooting.md.
"""

from __future__ import annotations

import re
from dataclasses import replace

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

# A bare number could be a size; after these words it is an error code.
_NUMBERED = r"(?:error code|retcode|ret code|result|return|ret|ErrCode)(?: is)?\s*[:=]?\s*\[?{code}(?!\d)"
_OWN_CODE = re.compile(r"\bERR(\d{2})(\d{3})\b")
_CALLED = (
    re.compile(r"call (aclnn\w+) failed"),
    # A name ends at a comma or a parenthesis; of some codes the meaning stands there, such as SUSPECT REMOTE ERROR.
    re.compile(r"(?:HCCL|NPU|OPS) function error: (?:\w+::)*(\w+)(?=[(,])"),
    re.compile(r"\btag\[([^\]]+)\]"),
    re.compile(r"the current working operator name is (\w+)"),
)


def explain(text: str) -> Fault | None:
    """The most telling fault that an error's text names; None if it names none that is known."""
    found = mentioned(text)
    return found[0] if found else None


def mentioned(text: str) -> list[Fault]:
    """Every fault that the text names, the most telling one first; torch_npu's own ERR codes come last."""
    found = [fault for fault in FAULTS if _pattern(fault).search(text)]
    for module, kind in _OWN_CODE.findall(text):
        own = _own_fault(module, kind)
        if own is not None and own not in found:
            found.append(own)
    return found


def is_communication(fault: Fault) -> bool:
    """Whether the fault is one of collectives, or only says that another rank is gone; a broken pipe may be either."""
    return fault in COLLECTIVES or fault.lost_peer or fault.code in ("BrokenPipe", "ERR02200")


def called(text: str) -> str | None:
    """The library function or collective that a text of torch_npu says failed; None if it says none."""
    for pattern in _CALLED:
        if match := pattern.search(text):
            return match.group(1)
    return None


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
        "A run that fails with one of these codes ends with an error that holds the same text, the rank and the",
        "operation; the original error stays attached above it. Other errors pass through as they are. Settings are",
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
