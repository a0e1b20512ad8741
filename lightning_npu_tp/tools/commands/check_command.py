"""`lightning-npu-tp check`: the conversion test without training, in four numbered steps and a comparison.

[1/4] tokenizer, [2/4] load, [3/4] MoE structure, [4/4] conversion; then forward and backward passes of the sharded
model, and of transformers' own in one process on the CPU. Here options become a request and the verdict an exit code;
the steps are `check_run.py`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.tools.commands import conventions as shared


def check(
    model: Annotated[str, typer.Option(help="Hugging Face folder with config.json and safetensors files")],
    tensor: shared.TensorRanks = 1,
    data: shared.DataRanks = 1,
    expert: shared.ExpertRanks = None,
    sequence_parallel: shared.SequenceParallel = False,
    dispatch: shared.DispatchMode = "auto",
    recompute: shared.RecomputeMode = "none",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or npu")] = "auto",
    dtype: Annotated[str, typer.Option(help="of the ranks: float32, bfloat16 or float64")] = "float32",
    length: Annotated[int, typer.Option(help="tokens of a sequence")] = 64,
    batch: Annotated[int | None, typer.Option(help="sequences, all ranks together; one per data rank")] = None,
    json_file: shared.JsonFile = None,
    timeout: Annotated[float, typer.Option(help="seconds that the ranks may take, and then one process")] = 1800.0,
) -> None:
    """Check without training that a folder's model loads, converts and computes in a layout.

    Reads the tokenizer, then the weights, each rank its own slices, and says what was converted; runs forward and
    backward on the device and holds loss, logits and gradient norm against transformers in one process on the CPU.
    """
    with shared.exit_codes(otherwise=2, wording=as_options):
        _require_sensible(data, length, batch, json_file)
        layout = shared.layout_of(data, tensor, expert)
        from lightning_npu_tp.tools.check_run import CheckRun

        options = shared.options_of(sequence_parallel, recompute, dispatch)
        rows = data if batch is None else batch
        run = CheckRun.prepared(
            model, layout, options, device=device, dtype=dtype, rows=rows, length=length, timeout=timeout
        )
    with shared.exit_codes("the ranks", otherwise=1, wording=as_options):
        run.run()
    shared.write_json(json_file, run.as_json())
    typer.echo(run.headline())
    raise typer.Exit(1 if run.faults else 0)


def _require_sensible(data: int, length: int, batch: int | None, json_file: Path | None) -> None:
    """Raise ConfigError for what cannot be, whatever the model is."""
    if batch is not None and batch < max(data, 1):
        raise ConfigError(f"--batch {batch} leaves some of --data {data} ranks without a sequence. Set it higher.")
    if length < 2:
        raise ConfigError(f"--length {length} leaves nothing to predict. Set --length to 2 or more.")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ConfigError(f"--json {json_file} lies in a folder that does not exist. Make it, or name another.")


def as_options(text: str) -> str:
    """The text with the strategy's settings by the names of this command's options."""
    for axis in ("data", "tensor", "expert"):
        text = text.replace(f"strategy.{axis}_parallel_size", f"--{axis}")
        text = text.replace(f"{axis}_parallel_size=", f"--{axis} ")
    return text.replace("strategy.dispatch", "--dispatch").replace("strategy.recompute", "--recompute")
