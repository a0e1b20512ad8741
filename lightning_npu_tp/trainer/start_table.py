"""The table at the start of a run: layout, dispatch, parameters and bytes per rank, communicators."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lightning_npu_tp.convert.convert import ConversionReport, Options
from lightning_npu_tp.parallel.layout import Meshes


def summary_table(
    reports: Sequence[ConversionReport], options: Options, meshes: Meshes, device_type: str, notes: Sequence[str] = ()
) -> str:
    """A table as text, of what was converted and for which layout; every rank's numbers are its own.

    notes: further lines, such as which groups cross hosts.
    """
    layout = meshes.layout
    table = Table(title="sharded model", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("ranks", f"{layout.world} on {device_type}: data {layout.data} x tensor {layout.tensor}")
    table.add_row("experts", f"divided over {layout.expert} ranks, {layout.expert_replicas} times")
    if layout.data > 1:
        how = "FSDP2, sharded" if options.data_parallel == "shard" else "replicated, gradients averaged"
        table.add_row("data ranks", how)
    if layout.tensor > 1:
        table.add_row("sequences between regions", "sliced over tensor ranks" if options.sequence_parallel else "whole")
    if options.recompute != "none":
        table.add_row("recomputed", options.recompute)
    for report in reports:
        name = f"{report.family} ({report.model})" if report.model else report.family
        share = report.local_parameters / max(report.parameters, 1)
        table.add_row(
            name,
            f"{report.parameters:,} parameters; on this rank {report.local_parameters:,} ({share:.1%}), "
            f"{_bytes(report.local_bytes)}",
        )
        if report.loaded is not None:
            table.add_row("weights", report.loaded.line())
        if report.dispatch != "none":
            table.add_row("dispatch", _DISPATCH[report.dispatch])
    for group, ranks in communicators(meshes).items():
        table.add_row(f"{group} group", f"ranks {', '.join(map(str, ranks))}")
    for note in notes:
        table.add_row("hosts", note)
    buffer = io.StringIO()
    Console(file=buffer, width=110, color_system=None).print(table)
    return buffer.getvalue().rstrip()


_DISPATCH = {
    "replicated": "replicated: every tensor rank sees the tokens, nothing is exchanged",
    "all_to_all": "all-to-all: rows travel to their experts and back",
}


def communicators(meshes: Meshes) -> dict[str, list[int]]:
    """Groups of more than one rank that this rank belongs to, with their ranks."""
    found = {}
    for mesh in (meshes.dense, meshes.expert):
        for axis, name in enumerate(mesh.mesh_dim_names or ()):
            if mesh.size(axis) > 1:
                found[name.replace("_", " ")] = mesh[name].mesh.tolist()
    return found


def _bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} bytes"
