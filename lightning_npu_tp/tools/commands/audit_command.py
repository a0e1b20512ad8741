"""`lightning-npu-tp audit`: prints what `audit_run.py` has found in a training step, as a table and as JSON."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.tools.commands import conventions as shared

if TYPE_CHECKING:
    from lightning_npu_tp.tools.audit import Finding


def audit(
    model: Annotated[
        str | None, typer.Option(help="Hugging Face folder, config.json, or a config of conf/model; made small")
    ] = None,
    module: Annotated[
        str | None,
        typer.Option(help="package.module:function that returns your LightningModule, or one and a batch; as it is"),
    ] = None,
    data: shared.DataRanks = 1,
    tensor: shared.TensorRanks = 1,
    expert: shared.ExpertRanks = None,
    sequence_parallel: shared.SequenceParallel = False,
    recompute: shared.RecomputeMode = "none",
    dispatch: shared.DispatchMode = "auto",
    data_parallel: shared.DataParallelMode = "shard",
    unconverted: Annotated[bool, typer.Option("--unconverted", help="as transformers computes it")] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    families: shared.OwnFamilies = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="pattern of an operator or file:line that does not count; may be repeated")
    ] = None,
    json_file: shared.JsonFile = None,
    timeout: shared.RankSeconds = 600.0,
) -> None:
    """Find what would stall an Ascend card in one training step: no card and no torch_npu needed.

    Operators that fall back to the CPU, have a shape that depends on values, make the host wait or refuse a dtype,
    by the operator table of torch_npu 2.13.0, each with its module, file, line and count. Exit code 1: there are some.
    """
    with shared.exit_codes("the step", otherwise=2):
        if (model is None) == (module is None):
            raise ConfigError("Say what to audit: either --model NAME or --module package.module:function.")
        layout = shared.layout_of(data, tensor, expert)
        from lightning_npu_tp.tools import audit_run
        from lightning_npu_tp.tools.model_config import read_model_config

        # A function beside the working folder's train.py, as Python itself would find it there.
        sys.path.insert(0, str(Path.cwd()))
        request = audit_run.Request(
            config=None if model is None else read_model_config(model),
            module=module or "",
            layout=layout,
            options=shared.options_of(sequence_parallel, recompute, dispatch, data_parallel),
            dtype=dtype,
            unconverted=unconverted,
            families=tuple(families or ()),
            allow=tuple(allow or ()),
        )
        findings, title = audit_run.audit(request, timeout=timeout)
        counted = [finding for finding in findings if not finding.allowed]
        found = [finding.as_json() for finding in findings]
        shared.write_json(json_file, {"audited": title, "ok": not counted, "findings": found})
    if findings:
        shared.wide_console().print(findings_table(findings, title))
    typer.echo(verdict(findings, title))
    raise typer.Exit(1 if counted else 0)


def findings_table(findings: Sequence[Finding], title: str) -> Table:
    """A section per kind and a row per line and fault; what is allowed comes last and is dim."""
    table = Table(title=title)
    table.add_column("what", overflow="fold", ratio=3)
    table.add_column("calls", justify="right")
    table.add_column("module", overflow="fold", ratio=3)
    table.add_column("line", overflow="fold", ratio=6)
    table.add_column("why, and what to do instead", overflow="fold", ratio=5)
    rows: dict[tuple[Any, ...], list[Finding]] = {}
    for finding in sorted(findings, key=lambda finding: bool(finding.allowed)):
        heading = "allowed" if finding.allowed else finding.kind
        remark = finding.allowed or f"{finding.why}: {finding.instead}"
        gradient = ", its gradient" if finding.place.backward else ""
        place = f"{finding.where} {finding.place.function}{gradient}\n{finding.place.source}"
        rows.setdefault((heading, remark, place), []).append(finding)
    kind = before = ""
    for (heading, remark, place), same in rows.items():
        if heading != kind:
            kind, before = heading, ""
            table.add_section()
            table.add_row(f"[bold]{kind}[/]")
        modules = dict.fromkeys(_any_layer(module) or "the root" for finding in same for module in finding.modules)
        table.add_row(
            escape("\n".join(finding.operator for finding in same)),
            "\n".join(str(finding.count) for finding in same),
            escape(", ".join(modules)),
            escape(place),
            "as above" if remark == before else escape(remark),
            style="dim" if heading == "allowed" else None,
        )
        before = remark
    return table


def _any_layer(module: str) -> str:
    """A module's path without the numbers of layers, which all do the same."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", module)


def verdict(findings: Sequence[Finding], title: str) -> str:
    """How many findings of each kind count, in one line."""
    counted = [finding for finding in findings if not finding.allowed]
    allowed = sum(finding.count for finding in findings if finding.allowed)
    also = f" ({allowed} allowed)" if allowed else ""
    if not counted:
        return f"{title}: nothing in a training step would stall an Ascend card{also}"
    kinds: dict[str, int] = {}
    for finding in counted:
        kinds[finding.kind] = kinds.get(finding.kind, 0) + finding.count
    numbers = ", ".join(f"{kind} {number}x" for kind, number in kinds.items())
    return f"{title}: {len(counted)} findings in a training step{also}: {numbers}"
