"""The command line, `lightning-npu-tp`: reads arguments, calls the part that does the work, prints its answer.

Exit code 0: what was asked holds. 1: it does not. 2: a mistake in the arguments, told in one line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lightning_npu_tp.errors import ConfigError, LightningNPUTPError, RankFailure
from lightning_npu_tp.tools.commands.audit import audit
from lightning_npu_tp.tools.commands.check import check as check_command
from lightning_npu_tp.tools.commands.doctor import doctor
from lightning_npu_tp.tools.commands.download import download
from lightning_npu_tp.tools.commands.export import export
from lightning_npu_tp.tools.commands.inspect import inspect
from lightning_npu_tp.tools.commands.rehearse import rehearse
from lightning_npu_tp.tools.commands.show_data import show_data
from lightning_npu_tp.tools.model_config import read_model_config

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

_WIDE = 160


@app.callback()
def main() -> None:
    """Tools around sharded training with lightning_npu_tp."""


@app.command()
def prove(
    model: Annotated[str, typer.Option(help="Hugging Face folder, config.json, or a config of conf/model")],
    data: Annotated[int, typer.Option(help="data ranks")] = 1,
    tensor: Annotated[int, typer.Option(help="tensor ranks")] = 1,
    expert: Annotated[int | None, typer.Option(help="expert ranks; as many as tensor ranks by default")] = None,
    sequence_parallel: Annotated[bool, typer.Option("--sequence-parallel", help="slice sequences")] = False,
    recompute: Annotated[str, typer.Option(help="none, moe or block")] = "none",
    dispatch: Annotated[str, typer.Option(help="auto, replicated or all_to_all")] = "auto",
    data_parallel: Annotated[str, typer.Option(help="shard or replicate")] = "shard",
    dtype: Annotated[
        str | None,
        typer.Option(help="of the ranks: float64 (bound 1e-10) or float32 (1e-3); the widest that the device has"),
    ] = None,
    device: Annotated[str, typer.Option(help="of the ranks: cpu, cuda, npu or auto")] = "cpu",
    families: Annotated[list[str] | None, typer.Option(help="your ModelFamily, as package.module:NAME")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the numbers to this file")] = None,
    timeout: Annotated[float, typer.Option(help="seconds that the ranks may take")] = 600.0,
    broken: Annotated[str | None, typer.Option("--break", hidden=True)] = None,
) -> None:
    """Show that a layout computes what one process computes.

    Makes the model small, trains three steps in DATA x TENSOR processes on this machine, and compares loss,
    logits, every gradient, clip norm, expert counts and parameters with transformers in one process on the CPU;
    before that one batch of each kind: without a mask, padded on either side, packed documents, balance losses.
    """
    try:
        from lightning_npu_tp.convert.convert import Options
        from lightning_npu_tp.parallel.layout import Layout
        from lightning_npu_tp.tools import check_folder
        from lightning_npu_tp.tools import prove as proving

        for name, size in (("data", data), ("tensor", tensor)):
            if size < 1:
                raise ConfigError(f"--{name} {size} is no number of ranks. Set --{name} to 1 or more.")
        layout = Layout.resolve(
            world=data * tensor, data=data, tensor=tensor, expert="auto" if expert is None else expert
        )
        options = Options(
            sequence_parallel=sequence_parallel,
            dispatch=dispatch,  # type: ignore[arg-type]
            recompute=recompute,  # type: ignore[arg-type]
            data_parallel=data_parallel,  # type: ignore[arg-type]
        )
        on = check_folder.device_type(device, layout.world)
        proof = proving.prove(
            read_model_config(model),
            layout,
            options,
            dtype=dtype or proving.widest(on),
            families=families or [],
            broken=broken,
            device=on,
            timeout=timeout,
        )
        if json_file is not None:
            json_file.write_text(json.dumps(proof.as_json(), indent=2) + "\n")
    except (RankFailure, TimeoutError) as error:
        typer.echo(f"error: the layout did not come to an end: {error}", err=True)
        raise typer.Exit(1) from error
    except (LightningNPUTPError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error
    # Names are long; a file or a pipe has no width of its own.
    Console(width=None if sys.stdout.isatty() else _WIDE).print(proof_table(proof))
    for note in proof.not_compared:
        typer.echo(f"not compared: {note}")
    typer.echo(proof.headline())
    raise typer.Exit(1 if proof.failed else 0)


def proof_table(proof: Any) -> Table:
    """A row per number and per sharding rule, with the worst relative differences and a verdict."""
    sizes = proof.layout
    split = f"data {sizes.data} x tensor {sizes.tensor}, experts over {sizes.expert}"
    table = Table(title=f"{proof.family}: {split}, {proof.dtype} on {proof.device}")
    for column in ("number or rule", "split", "value or gradient", f"after {proof.steps} steps", "worst in", ""):
        table.add_column(column, overflow="fold")
    for check in proof.checks:
        numbers = ["" if worst is None else f"{worst.difference:.1e}" for worst in (check.gradient, check.after)]
        verdict = "[green]pass[/]" if check.passed(proof.bound) else "[bold red]FAIL[/]"
        table.add_row(check.name, check.split, *numbers, check.worst.where, verdict)
    return table


for command in (audit, check_command, doctor, download, export, inspect, rehearse):
    app.command()(command)
# What follows are the settings of the project's own script.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(show_data)
