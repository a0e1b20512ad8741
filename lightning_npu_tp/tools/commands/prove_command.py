"""`lightning-npu-tp prove`: reads the layout, prints the numbers of `prove.py`, and decides the exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lightning_npu_tp.tools.commands import conventions as shared

if TYPE_CHECKING:
    from lightning_npu_tp.tools.proof import Proof


def prove(
    model: Annotated[str, typer.Option(help="Hugging Face folder, config.json, or a config of conf/model")],
    data: shared.DataRanks = 1,
    tensor: shared.TensorRanks = 1,
    expert: shared.ExpertRanks = None,
    sequence_parallel: shared.SequenceParallel = False,
    recompute: shared.RecomputeMode = "none",
    dispatch: shared.DispatchMode = "auto",
    data_parallel: shared.DataParallelMode = "shard",
    dtype: Annotated[
        str | None,
        typer.Option(help="of the ranks: float64 (bound 1e-10) or float32 (1e-3); the widest that the device has"),
    ] = None,
    device: Annotated[str, typer.Option(help="of the ranks: cpu, cuda, npu or auto")] = "cpu",
    families: shared.OwnFamilies = None,
    json_file: shared.JsonFile = None,
    timeout: shared.RankSeconds = 600.0,
    broken: Annotated[str | None, typer.Option("--break", hidden=True)] = None,
) -> None:
    """Show that a layout computes what one process computes.

    Makes the model small, trains three steps in DATA x TENSOR processes on this machine, and compares loss,
    logits, every gradient, clip norm, expert counts and parameters with transformers in one process on the CPU;
    before that one batch of each kind: without a mask, padded on either side, packed documents, balance losses.
    """
    with shared.exit_codes("the layout", otherwise=2):
        layout = shared.layout_of(data, tensor, expert)
        from lightning_npu_tp.tools import check_folder
        from lightning_npu_tp.tools import prove as proving
        from lightning_npu_tp.tools.model_config import read_model_config

        device_type = check_folder.device_type(device, layout.world)
        proof = proving.prove(
            read_model_config(model),
            layout,
            shared.options_of(sequence_parallel, recompute, dispatch, data_parallel),
            dtype=dtype or proving.widest(device_type),
            families=families or [],
            broken=broken,
            device=device_type,
            timeout=timeout,
        )
        shared.write_json(json_file, proof.as_json())
    shared.wide_console().print(proof_table(proof))
    for note in proof.not_compared:
        typer.echo(f"not compared: {note}")
    typer.echo(proof.headline())
    raise typer.Exit(1 if proof.failed else 0)


def proof_table(proof: Proof) -> Table:
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
