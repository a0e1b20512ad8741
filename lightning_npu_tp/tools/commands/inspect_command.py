"""`lightning-npu-tp inspect`: what a training checkpoint is, and whether it is complete and undamaged.

Reads the manifest, the index and checksums; no tensor is loaded and nothing of the checkpoint is run. A folder of
checkpoints gives one row for each.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lightning_npu_tp.checkpoint.files import in_place, left_beside, size_in_words
from lightning_npu_tp.checkpoint.locks import holder_of, reading
from lightning_npu_tp.checkpoint.manifest import (
    Manifest,
    age_key,
    checkpoints_in,
    incomplete,
    is_before_manifests,
    is_sharded,
    parse_manifest,
    verify,
)
from lightning_npu_tp.errors import CheckpointError
from lightning_npu_tp.tools.commands.conventions import wide_console


@dataclass
class Finding:
    """What was found out about one checkpoint.

    problems: what is wrong, each naming the file; none if it can be loaded.
    verified: whether the checksums were compared, and are right.
    sizes:    bytes of weights, optimizer states and the rest.
    """

    path: Path
    problems: list[str] = field(default_factory=list)
    verified: bool = False
    manifest: Manifest | None = None
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """Completeness and verification in a few words."""
        if self.problems:
            return "damaged or incomplete"
        return "complete, verified" if self.verified else "complete, not verified"

    def as_json(self) -> dict[str, Any]:
        """The finding as plain data, the manifest included."""
        manifest = None if self.manifest is None else asdict(self.manifest)
        return {
            "path": str(self.path),
            "complete": not self.problems,
            "verified": self.verified,
            "problems": self.problems,
            "sizes": self.sizes,
            "manifest": manifest,
        }


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint, or a folder that holds checkpoints")],
    verify_checksums: Annotated[bool, typer.Option("--verify/--no-verify", help="read every file and compare")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Say what a training checkpoint holds, and whether it is complete and its checksums are right.

    Exit code 0: complete (and verified). 1: damaged or incomplete, with the files named. 2: there is no checkpoint.
    """
    path = in_place(checkpoint)
    inside = checkpoints_in(path) or checkpoints_in(path / "checkpoints")
    if path.is_file() or is_sharded(path):
        findings = [look_at(path, checksums=verify_checksums)]
        content: Any = findings[0].as_json()
        table = describe(findings[0])
    elif inside:
        findings = [look_at(one, checksums=verify_checksums) for one in sorted(inside, key=age_key)]
        chosen = would_take(findings)
        content = {"checkpoints": [finding.as_json() for finding in findings]} | chosen
        table = overview(findings, chosen)
    else:
        what = "a folder without checkpoints" if path.is_dir() else "does not exist"
        typer.echo(f"error: {checkpoint} {'is ' if path.is_dir() else ''}{what}.", err=True)
        raise typer.Exit(2)
    if as_json:
        typer.echo(json.dumps(content, indent=2, default=str))
    else:
        wide_console().print(table)
        for problem in [problem for finding in findings for problem in finding.problems]:
            typer.echo(problem)
    raise typer.Exit(1 if any(finding.problems for finding in findings) else 0)


def look_at(path: Path, *, checksums: bool) -> Finding:
    """Examine one checkpoint, folder or file, which may be replaced meanwhile."""
    finding = Finding(path)
    with reading(path) as pinned:
        _fill(finding, pinned, checksums)
    finding.problems = [problem.replace(str(pinned), str(path)) for problem in finding.problems]
    return finding


def _fill(finding: Finding, path: Path, checksums: bool) -> None:
    if not path.is_file() and is_before_manifests(path):
        finding.sizes = _sizes(path, finding)
        return
    try:
        finding.manifest = None if path.is_file() else parse_manifest(path)
    except CheckpointError as error:
        finding.problems = [str(error)]
        return
    finding.problems = verify(path) if checksums else [reason] if (reason := incomplete(path)) else []
    if path.is_file():
        finding.sizes = {"rest": path.stat().st_size}
    elif not finding.problems:
        finding.sizes = _sizes(path, finding)
    finding.verified = checksums and not finding.problems


def _sizes(path: Path, finding: Finding) -> dict[str, int]:
    """Bytes by what they are for, read from the index."""
    # torch takes seconds to import, which a damaged checkpoint need not wait for.
    from lightning_npu_tp.checkpoint.reader import read_index

    total = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    sizes = {"weights": 0, "optimizers": 0}
    try:
        for index, info in read_index(path).storage_data.items():
            sizes["weights" if index.fqn.startswith("model.") else "optimizers"] += info.length
    except CheckpointError as error:
        finding.problems.append(str(error))
    return sizes | {"rest": total - sum(sizes.values())}


def would_take(findings: list[Finding]) -> dict[str, str | None]:
    """Which checkpoint `ckpt_path="last"` and `resume=auto` would take. findings: oldest first."""
    good = [finding.path for finding in findings if not finding.problems]
    last = [path for path in good if path.name.removeprefix(".").startswith("last")]
    if good and not last:
        link = good[0].parent / "last.ckpt"
        last = [path for path in good if link.is_symlink() and path.resolve() == link.resolve()]
    newest = str(good[-1]) if good else None
    return {"auto": newest, "last": str(last[-1]) if last else newest}


def overview(findings: list[Finding], chosen: dict[str, str | None]) -> Table:
    """A row per checkpoint, and what lies beside them."""
    folder = findings[0].path.parent
    beside = []
    for left, name, kind in left_beside(folder):
        holder = holder_of(folder / name)
        who = f"{holder.purpose} by process {holder.pid} of {holder.host}" if holder else "left by a run that died"
        beside.append(f"{left.name} ({kind}): {who}")
    table = Table(title=f"checkpoints in {folder}", caption="\n".join(beside) or None)
    for column in ("name", "step", "epoch", "created (UTC)", "layout", "size", "state", "taken by"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        manifest = finding.manifest
        facts = (
            ["?"] * 4
            if manifest is None
            else [str(manifest.step), str(manifest.epoch), manifest.created[:19], _layout(manifest)]
        )
        taken = [name for name, path in chosen.items() if path == str(finding.path)]
        size = size_in_words(sum(finding.sizes.values()))
        table.add_row(finding.path.name, *facts, size, _coloured(finding), ", ".join(taken))
    return table


def describe(finding: Finding) -> Table:
    """All that is known of one checkpoint."""
    table = Table(title=str(finding.path), show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    table.add_row("state", _coloured(finding))
    manifest = finding.manifest
    if manifest is None:
        if not finding.problems:
            table.add_row("manifest", "none: written by an earlier version, or by another strategy")
    else:
        table.add_row("step, epoch", f"{manifest.step}, {manifest.epoch}")
        table.add_row("created (UTC)", manifest.created)
        table.add_row("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
        table.add_row("saved by", f"{manifest.world} ranks: {_layout(manifest)}")
        table.add_row("can be loaded by", "any layout and any number of ranks")
        for name, model in manifest.models.items():
            table.add_row(
                f"model {name}".strip(), f"{model['family']}, {model['parameters']:,} parameters, {model['dtype']}"
            )
        tokenizer = manifest.tokenizer
        if tokenizer is not None:
            source = tokenizer.get("source") or tokenizer["path"]
            where = f" from {source}" if source else ""
            table.add_row(
                "tokenizer",
                f"{tokenizer['name']}{where}, vocabulary {tokenizer['vocab_size']}, {tokenizer['fingerprint'][:12]}",
            )
        optimizers = manifest.contents.get("optimizers", 0)
        table.add_row("optimizers", str(optimizers) if optimizers else "none: weights only")
    for what, size in finding.sizes.items():
        table.add_row(f"size of {what}", size_in_words(size))
    return table


def _layout(manifest: Manifest) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in manifest.layout.items()) or "unknown"


def _coloured(finding: Finding) -> str:
    colour = "bold red" if finding.problems else "green" if finding.verified else "yellow"
    return f"[{colour}]{finding.state}[/]"
