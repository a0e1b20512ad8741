"""`lightning-npu-tp doctor`: prints what `doctor.py` has found, as a table or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from lightning_npu_tp.tools.commands.conventions import wide_console

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    host: Annotated[list[str] | None, typer.Option(help="compare this host's clock, by ssh; may be repeated")] = None,
    folder: Annotated[Path, typer.Option(help="where checkpoints would be written")] = Path("."),
) -> None:
    """Say what on this machine would keep a run from training, and what to do about it.

    Exit code 0: nothing would; 1: a line says fail.
    """
    from lightning_npu_tp.tools.doctor import examine

    lines = examine(host or (), folder)
    failed = any(line.status == "fail" for line in lines)
    if as_json:
        typer.echo(json.dumps({"ok": not failed, "checks": [asdict(line) for line in lines]}, indent=2))
        raise typer.Exit(int(failed))
    table = Table(show_header=False)
    for column in ("what", "status", "found"):
        table.add_column(column, overflow="fold")
    for line in lines:
        found = escape(f"{line.detail}\n-> {line.fix}" if line.fix else line.detail)
        table.add_row(escape(line.name), f"[{_COLOURS[line.status]}]{line.status}[/]", found)
    wide_console().print(table)
    counts = {status: sum(line.status == status for line in lines) for status in _COLOURS}
    typer.echo(", ".join(f"{number} {status}" for status, number in counts.items()))
    raise typer.Exit(int(failed))
