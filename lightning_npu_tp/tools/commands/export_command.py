"""`lightning-npu-tp export`: a training checkpoint as a Hugging Face folder, on one process and without a device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.tools.commands.conventions import OwnFamilies, exit_codes

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(text: str, option: str) -> int:
    """A size such as 5GB or 500MiB in bytes. Raises ConfigError for anything else and for none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found and found[2].upper() in _UNITS else 0
    if size < 1:
        raise ConfigError(f"{option} {text} is no size. Give a number with a unit, such as 5GB or 500MB.")
    return size


def export(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint folder of any layout, or a file of plain Lightning")],
    out: Annotated[Path, typer.Argument(help="the Hugging Face folder; must not exist, or be empty")],
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16, float32 or float64; as it is by default")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="of a safetensors file")] = "5GB",
    tokenizer: Annotated[str | None, typer.Option(help="folder or tokenizer.json; none for none")] = None,
    config: Annotated[str | None, typer.Option(help="of the model: Hugging Face folder or config.json")] = None,
    model: Annotated[str | None, typer.Option(help="path of the model in its module, if there are several")] = None,
    families: OwnFamilies = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="neither checksums nor comparisons")] = False,
) -> None:
    """Write a checkpoint's weights as a Hugging Face folder that transformers and vLLM load.

    The published per-expert names, safetensors files with index, config, generation config and tokenizer. Then the
    folder is loaded through transformers and every tensor compared with the checkpoint, bit for bit.
    """
    with exit_codes(otherwise=1):
        from lightning_npu_tp.tools.prove import load_families
        from lightning_npu_tp.weights.hf_export import DTYPES, export_checkpoint

        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"--dtype {dtype} is not known. Set it to one of {', '.join(DTYPES)}.")
        if not checkpoint.exists():
            raise ConfigError(f"{checkpoint} does not exist. Give a checkpoint folder or file.")
        done = export_checkpoint(
            checkpoint,
            out,
            dtype=None if dtype is None else DTYPES[dtype],
            max_shard_bytes=bytes_of(max_shard_size, "--max-shard-size"),
            tokenizer=None if tokenizer in (None, "none") else Path(str(tokenizer)),
            with_tokenizer=tokenizer != "none",
            config=None if config is None else _config(config),
            model=model,
            families=load_families(families or []),
            verify=not no_verify,
        )
    for note in done.notes:
        typer.echo(note)
    if done.differences:
        shown = "; ".join(done.differences[:20]) + ("; …" if len(done.differences) > 20 else "")
        typer.echo(f"error: {len(done.differences)} differences, {out} was not written: {shown}", err=True)
        raise typer.Exit(1)
    compared = "nothing compared (--no-verify)"
    if done.compared is not None:
        compared = f"all {done.compared} equal to the checkpoint, bit for bit"
        if done.reloaded is not None:
            compared += f"; loaded through transformers, all {done.reloaded} of its tensors equal too"
    files = "1 file" if len(done.files) == 1 else f"{len(done.files)} files"
    typer.echo(f"{out}: {done.tensors} tensors, {done.weight_bytes / 1e9:.3f} GB {done.dtype} in {files}; {compared}")


def _config(given: str) -> object:
    from lightning_npu_tp.tools.model_config import read_model_config

    try:
        return read_model_config(given)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--model", "--config")) from error
