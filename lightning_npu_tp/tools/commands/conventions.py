"""What the commands have in common: options of a layout, exit codes of errors, and the width of what is printed.

Nothing heavy is imported with it: a misspelt option and `--help` are answered before torch is loaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lightning_npu_tp.errors import ConfigError, LightningNPUTPError, RankFailure

if TYPE_CHECKING:
    from lightning_npu_tp.convert.convert import Options
    from lightning_npu_tp.parallel.layout import Layout

DataRanks = Annotated[int, typer.Option(help="data ranks")]
TensorRanks = Annotated[int, typer.Option(help="tensor ranks")]
ExpertRanks = Annotated[int | None, typer.Option(help="expert ranks; as many as tensor ranks by default")]
SequenceParallel = Annotated[bool, typer.Option("--sequence-parallel", help="slice sequences")]
RecomputeMode = Annotated[str, typer.Option(help="none, moe or block")]
DispatchMode = Annotated[str, typer.Option(help="auto, replicated or all_to_all")]
DataParallelMode = Annotated[str, typer.Option(help="shard or replicate")]
OwnFamilies = Annotated[list[str] | None, typer.Option(help="your ModelFamily, as package.module:NAME")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="write the numbers to this file")]
RankSeconds = Annotated[float, typer.Option(help="seconds that the ranks may take")]

_WIDE = 160


def layout_of(data: int, tensor: int, expert: int | None) -> Layout:
    """The layout of --data, --tensor and --expert. Raises ConfigError for one that cannot be."""
    from lightning_npu_tp.parallel.layout import Layout

    for name, size in (("data", data), ("tensor", tensor)):
        if size < 1:
            raise ConfigError(f"--{name} {size} is no number of ranks. Set --{name} to 1 or more.")
    return Layout.resolve(world=data * tensor, data=data, tensor=tensor, expert="auto" if expert is None else expert)


def options_of(sequence_parallel: bool, recompute: str, dispatch: str, data_parallel: str = "shard") -> Options:
    """How the layout is used, by the options of the same names. Raises ConfigError for a value that does not exist."""
    from lightning_npu_tp.convert.convert import Options

    return Options(
        sequence_parallel=sequence_parallel,
        dispatch=dispatch,  # type: ignore[arg-type]
        recompute=recompute,  # type: ignore[arg-type]
        data_parallel=data_parallel,  # type: ignore[arg-type]
    )


def wide_console() -> Console:
    """Prints tables as wide as the terminal; a file or a pipe has no width of its own, and names are long."""
    return Console(width=None if sys.stdout.isatty() else _WIDE)


def write_json(file: Path | None, content: Any) -> None:
    """Write what was found to the file of --json, if one was named."""
    if file is not None:
        file.write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def exit_codes(work: str = "", *, otherwise: int, wording: Callable[[str], str] = str) -> Iterator[None]:
    """Tell what goes wrong inside by one line `error: …` and an exit code.

    2: a ConfigError or a file that cannot be read or written. 1: `work`, "the step" say, was begun on ranks and
    failed or took too long there. otherwise: the code for the package's other errors, by what the command has done.
    wording: what becomes of the text, for settings that options name differently.
    """
    try:
        yield
    except (LightningNPUTPError, OSError) as error:
        if work and isinstance(error, RankFailure | TimeoutError):
            text, code = f"{work} did not come to an end: {error}", 1
        else:
            text = wording(" ".join(str(error).split()))
            code = 2 if isinstance(error, ConfigError | OSError) else otherwise
        typer.echo(f"error: {text}", err=True)
        raise typer.Exit(code) from error
