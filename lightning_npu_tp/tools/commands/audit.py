"""`lightning-npu-tp audit`: prints what `audit_run.py` has found in a training step, as a table and as JSON."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_npu_tp.errors import ConfigError, LightningNPUTPError, RankFailure

_WIDE = 160


def audit(
    model: Annotated[
        str | None, typer.Option(help="Hugging Face folder, config.json, or a config of conf/model; made small")
    ] = None,
    module: Annotated[
        str | None,
        typer.Option(help="package.module:function that returns your LightningModule, or one and a batch; as it is"),
    ] = None,
    data: Annotated[int, typer.Option(help="data ranks")] = 1,
    tensor: Annotated[int, typer.Option(help="tensor ranks")] = 1,
    expert: Annotated[int | None, typer.Option(help="expert ranks; as many as tensor ranks by default")] = None,
    sequence_parallel: Annotated[bool, typer.Option("--sequence-parallel", help="slice sequences")] = False,
    recompute: Annotated[str, typer.Option(help="none, moe or block")] = "none",
    dispatch: Annotated[str, typer.Option(help="auto, replicated or all_to_all")] = "auto",
    data_parallel: Annotated[str, typer.Option(help="shard or replicate")] = "shard",
    unconverted: Annotated[bool, typer.Option("--unconverted", help="as transformers computes it")] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    families: Annotated[list[str] | None, typer.Option(help="your ModelFamily, as package.module:NAME")] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="pattern of an operator or file:line that does not count; may be repeated")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the findings to this file")] = None,
    timeout: Annotated[float, typer.Option(help="seconds that the ranks may take")] = 600.0,
) -> None:
    """Find what would stall an Ascend card in one training step: no card and no torch_npu needed.

    Operators that fall back to the CPU, have a shape that depends on values, make the host wait or refuse a dtype,
    by the operator table of torch_npu 2.13.0, each with its module, file, line and count. Exit code 1: there are some.
    """
    try:
        what = _what(
            model, module, data, tensor, expert, sequence_parallel, recompute, dispatch, data_parallel, unconverted
        )
        from lightning_npu_tp.tools import audit_run

        request = audit_run.Request(
            **what, dtype=dtype, unconverted=unconverted, families=tuple(families or ()), allow=tuple(allow or ())
        )
        findings, title = audit_run.audit(request, timeout=timeout)
        counted = [finding for finding in findings if not finding.allowed]
        if json_file is not None:
            content = {"audited": title, "ok": not counted, "findings": [finding.as_json() for finding in findings]}
            json_file.write_text(json.dumps(content, indent=2) + "\n")
    except (RankFailure, TimeoutError) as error:
        typer.echo(f"error: the step did not come to an end: {error}", err=True)
        raise typer.Exit(1) from error
    except (LightningNPUTPError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error
    console = Console(width=None if sys.stdout.isatty() else _WIDE)
    if findings:
        console.print(findings_table(findings, title))
    typer.echo(verdict(findings, title))
    raise typer.Exit(1 if counted else 0)


def _what(
    model: str | None,
    module: str | None,
    data: int,
    tensor: int,
    expert: int | None,
    sequence_parallel: bool,
    recompute: str,
    dispatch: str,
    data_parallel: str,
    unconverted: bool,
) -> dict[str, Any]:
    """What to audit, as `audit_run.Request` takes it. Raises ConfigError for options that cannot be."""
    if (model is None) == (module is None):
        raise ConfigError("Say what to audit: either --model NAME or --module package.module:function.")
    for name, size in (("data", data), ("tensor", tensor)):
        if size < 1:
            raise ConfigError(f"--{name} {size} is no number of ranks. Set --{name} to 1 or more.")
    from lightning_npu_tp.convert.convert import Options
    from lightning_npu_tp.parallel.layout import Layout
    from lightning_npu_tp.tools.model_config import read_model_config

    # A function beside the working folder's train.py, as Python itself would find it there.
    sys.path.insert(0, str(Path.cwd()))
    return {
        "config": None if model is None else read_model_config(model),
        "module": module or "",
        "layout": Layout.resolve(
            world=data * tensor, data=data, tensor=tensor, expert="auto" if expert is None else expert
        ),
        "options": Options(
            sequence_parallel=sequence_parallel,
            dispatch=dispatch,  # type: ignore[arg-type]
            recompute=recompute,  # type: ignore[arg-type]
            data_parallel=data_parallel,  # type: ignore[arg-type]
        ),
    }


def findings_table(findings: Sequence[Any], title: str) -> Table:
    """A section per kind and a row per line and fault; what is allowed comes last and is dim."""
    table = Table(title=title)
    table.add_column("what", overflow="fold", ratio=3)
    table.add_column("calls", justify="right")
    table.add_column("module", overflow="fold", ratio=3)
    table.add_column("line", overflow="fold", ratio=6)
    table.add_column("why, and what to do instead", overflow="fold", ratio=5)
    rows: dict[tuple[Any, ...], list[Any]] = {}
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


def verdict(findings: Sequence[Any], title: str) -> str:
    """The answer in one line."""
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
