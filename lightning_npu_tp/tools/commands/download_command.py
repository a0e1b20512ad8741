"""`lightning-npu-tp download`: a model's weights, config and tokenizer from Hugging Face, ModelScope or a mirror."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.tools.commands.conventions import exit_codes, wide_console


def download(
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the hub")],
    dest: Annotated[Path, typer.Argument(help="folder; what is there and right is kept")],
    source: Annotated[str, typer.Option("--from", help="huggingface or modelscope")] = "huggingface",
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit; the main branch by default")] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="address of a mirror; HF_ENDPOINT by default for Hugging Face")
    ] = None,
    token_env: Annotated[
        str, typer.Option(help="environment variable that holds a token, for gated models")
    ] = "HF_TOKEN",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be fetched")] = False,
) -> None:
    """Fetch what loading a model needs, verify sizes and hashes; run it again to go on after an interruption.

    Only safetensors, config, generation config and tokenizer: no .bin, .pt, .gguf or ONNX copies of the weights.
    """
    from lightning_npu_tp.checkpoint.files import size_in_words
    from lightning_npu_tp.weights import hub_download as downloading
    from lightning_npu_tp.weights import modelscope_download

    is_modelscope = source == "modelscope"
    endpoint = (endpoint or ("" if is_modelscope else os.environ.get("HF_ENDPOINT")) or "").rstrip("/") or None
    token = os.environ.get(token_env) or None
    with exit_codes(otherwise=1):
        if token is None and token_env != "HF_TOKEN":
            raise ConfigError(f"--token-env {token_env}: no such variable is set. Set it, or leave the option out.")
        if source not in ("huggingface", "modelscope"):
            raise ConfigError(f"--from {source} is no hub. Use huggingface or modelscope.")
        hub = modelscope_download if is_modelscope else downloading
        revision = revision or (modelscope_download.REVISION if is_modelscope else "main")
        listing = hub.list_repository(repo_id, revision=revision, endpoint=endpoint, token=token)
        table = Table(title=f"{repo_id} at {listing.commit[:12]}")
        table.add_column("file", overflow="fold")
        table.add_column("size", justify="right")
        for file in listing.files:
            table.add_row(file.name, size_in_words(file.bytes))
        wide_console().print(table)
        free = downloading.require_space(listing, dest)
        typer.echo(
            f"{len(listing.files)} files, {size_in_words(listing.bytes)}; {size_in_words(free)} are free in {dest}; "
            f"{len(listing.skipped)} files of the repository are not needed"
        )
        if dry_run:
            return
        downloading.fetch(listing, dest, hub.getter(listing, endpoint=endpoint, token=token), tell=typer.echo)
        verified = sum(1 for file in listing.files if file.has_hash)
        how_many = "all" if verified == len(listing.files) else f"{verified} of them"
        typer.echo(f"{dest}: {len(listing.files)} files of {repo_id}, {how_many} verified")
