"""`lightning-npu-tp rehearse`: a run on a simulated Ascend, summed up at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from lightning_npu_tp.tools.commands.conventions import JsonFile, exit_codes, wide_console, write_json
from lightning_npu_tp.tools.rehearse import Rehearsal
from lightning_npu_tp.tools.rehearse import rehearse as run_rehearsal


def rehearse(
    command: Annotated[list[str], typer.Argument(help="the run, behind `--`: -- python train.py …")],
    devices: Annotated[int, typer.Option("-n", "--devices", help="simulated cards")] = 4,
    memory_gib: Annotated[float | None, typer.Option(help="memory of each card, in GiB [64]")] = None,
    soc: Annotated[str | None, typer.Option(help="name of the chip [Ascend910B3]")] = None,
    float64: Annotated[bool, typer.Option("--float64", help="cards that compute in float64 too")] = False,
    fault: Annotated[list[str] | None, typer.Option(help="a fault on purpose, see docs/simulator.md")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="exit with 1 for operators that ran on the CPU")] = False,
    top: Annotated[int, typer.Option(help="how many places of host waits to list")] = 10,
    json_file: JsonFile = None,
    report_dir: Annotated[Path | None, typer.Option(help="keep the report of each process there")] = None,
) -> None:
    """Run a command under the real torch_npu on simulated Ascend cards, and sum up what it did on them.

    Exit code: the run's own; 1 if no process used a card, or as --strict asks; 2 for a mistake in the arguments.
    """
    with exit_codes(otherwise=2):
        rehearsal = run_rehearsal(
            command,
            devices=devices,
            memory_gib=memory_gib,
            soc=soc,
            float64=float64,
            faults=fault or (),
            report_dir=report_dir,
        )
        write_json(json_file, rehearsal.as_json())
    if rehearsal.processes:
        wide_console().print(*tables(rehearsal, top))
    typer.echo(verdict(rehearsal))
    raise typer.Exit(exit_code(rehearsal, strict))


def exit_code(rehearsal: Rehearsal, strict: bool) -> int:
    """The run's own, or 1 for what a run that went well did not do well."""
    if rehearsal.exit_code:
        return rehearsal.exit_code
    return int(not rehearsal.processes or bool(rehearsal.misuses) or (strict and bool(rehearsal.fallbacks)))


def verdict(rehearsal: Rehearsal) -> str:
    """One line: how the run ended and what would be different on a card."""
    ended = f"the run ended with exit code {rehearsal.exit_code}"
    if not rehearsal.processes:
        return f"{ended}; no process used a simulated card. Train on it with trainer.accelerator=npu."
    return (
        f"{ended}; {len(rehearsal.processes)} processes on simulated cards, "
        f"{sum(rehearsal.fallbacks.values())} operators fell back to the CPU, "
        f"{sum(rehearsal.waits.values())} host waits, {rehearsal.misuses} unordered accesses to device memory"
    )


def tables(rehearsal: Rehearsal, top: int) -> list[Table]:
    """Memory by process, HCCL traffic by operation and group, fallbacks and host waits where there are any."""
    memory = _table("device memory", "process", "device", "peak MiB")
    for process in rehearsal.processes:
        for device, nbytes in sorted(process.peaks.items()):
            # The process that the user started has no rank in its environment.
            who = "main process" if process.rank is None else f"rank {process.rank}"
            memory.add_row(f"{who} (pid {process.pid})", str(device), f"{nbytes / 2**20:,.1f}")
    found = [memory]
    if rehearsal.traffic:
        traffic = _table("HCCL traffic, all processes", "operation", "group", "calls", "MiB")
        for (operation, group), (calls, nbytes) in sorted(rehearsal.traffic.items(), key=lambda item: -item[1][1]):
            traffic.add_row(operation, escape(group), f"{calls:,}", f"{nbytes / 2**20:,.2f}")
        found.append(traffic)
    if rehearsal.fallbacks:
        fallbacks = _table("operators that ran on the CPU", "operator", "times")
        for operator, times in rehearsal.fallbacks.most_common():
            fallbacks.add_row(operator, f"{times:,}")
        found.append(fallbacks)
    if rehearsal.waits:
        waits = _table(f"the host waited for the device ({top} most frequent)", "call", "place", "times")
        for place, times in rehearsal.waits.most_common(top):
            call, _, where = place.partition(" ")
            waits.add_row(call, escape(_shortened(where)), f"{times:,}")
        found.append(waits)
    return found


def _shortened(place: str) -> str:
    """A place in an installed package from the package on, others from the working folder on."""
    return place.rpartition("site-packages/")[2].removeprefix(f"{Path.cwd()}/")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        options: dict[str, Any] = {"justify": "right"} if column in ("calls", "MiB", "peak MiB", "times") else {}
        table.add_column(column, overflow="fold", **options)
    return table
