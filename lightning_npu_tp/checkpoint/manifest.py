"""The manifest of a training checkpoint: what it is, and every file with its size and checksum.

`manifest.json` is written last, so its presence, with its own checksum right and every file of the named size, is what
makes a checkpoint complete. Readable without torch and before anything else of the checkpoint is trusted.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning_npu_tp.checkpoint.files import PREVIOUS, crc32_of, in_place, left_beside, sealed_json, unsealed_json
from lightning_npu_tp.errors import CheckpointError

FORMAT = 1
MANIFEST_FILE = "manifest.json"
# What the state besides tensors is in; Lightning's consolidation script looks for the name.
REST_FILE = "meta.pt"
DCP_FILE = ".metadata"


@dataclass
class Manifest:
    """What `manifest.json` holds.

    layout:    sizes of the axes data, tensor and expert of the run that saved.
    models:    path of a converted submodule -> {family, config, dtype, parameters}.
    tokenizer: None, or {name, path, vocab_size, fingerprint}.
    contents:  {weights: true, optimizers: number, ranks: number of rank_<r>.pt}.
    files:     name -> {bytes, crc32}.
    """

    step: int = 0
    epoch: int = 0
    world: int = 1
    layout: dict[str, int] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizer: dict[str, Any] | None = None
    contents: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat())
    format: int = FORMAT

    def as_bytes(self) -> bytes:
        """The content of `manifest.json`, its own checksum at the end."""
        return sealed_json({"format": self.format} | asdict(self))

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Manifest:
        """A manifest of what `manifest.json` holds; unknown keys are dropped, so that later additions can be read."""
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def read_manifest(path: Path) -> Manifest:
    """The manifest of a complete checkpoint folder.

    Raises CheckpointError if the folder is incomplete, the manifest damaged, a file absent or of another size, or the
    format newer than this version of the package reads.
    """
    manifest = parse_manifest(path)
    if problems := _sizes(path, manifest):
        raise CheckpointError(f"The checkpoint {path} is damaged: {'; '.join(problems)}. {WHAT_TO_DO}")
    return manifest


WHAT_TO_DO = "Take an earlier checkpoint; `lightning-npu-tp inspect` on the folder that holds it says which are good."


def parse_manifest(path: Path) -> Manifest:
    """The manifest of a folder whose other files are not looked at; raises CheckpointError as `read_manifest`."""
    file = path / MANIFEST_FILE
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        what = "is incomplete" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"The checkpoint {path} {what}: no {MANIFEST_FILE}, which is written last. {WHAT_TO_DO}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    values = unsealed_json(raw)
    if values is None:
        raise CheckpointError(f"{file} is damaged: its checksum is not that of its content. {WHAT_TO_DO}")
    if values["format"] > FORMAT:
        raise CheckpointError(
            f"The checkpoint {path} has format {values['format']}, and this version of lightning_npu_tp reads up to "
            f"{FORMAT}. Use the version that wrote it ({values.get('versions', {}).get('lightning_npu_tp', '?')}) or a "
            f"newer one."
        )
    return Manifest.from_values(values)


def _sizes(path: Path, manifest: Manifest) -> list[str]:
    problems = []
    for name, entry in manifest.files.items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            problems.append(f"{path / name} cannot be read ({error.strerror})")
            continue
        if size != entry["bytes"]:
            problems.append(f"{path / name} has {size} bytes instead of {entry['bytes']}")
    return problems


def is_sharded(path: Path) -> bool:
    """Whether `path` is a checkpoint folder, of whatever age and state."""
    return path.is_dir() and any((path / name).is_file() for name in (MANIFEST_FILE, REST_FILE, DCP_FILE))


def is_before_manifests(path: Path) -> bool:
    """Whether `path` is a folder that a version before manifests wrote; it wrote meta.pt last."""
    # Folders with a manifest have a file for each rank besides; without it a copy that was cut short looks alike.
    files = (path / MANIFEST_FILE, path / "rank_0.pt", path / REST_FILE, path / DCP_FILE)
    return [file.is_file() for file in files] == [False, False, True, True]


def incomplete(path: Path) -> str:
    """Why a checkpoint, folder or file, is not complete, or an empty text; looks at sizes, not at checksums."""
    if path.is_file():
        return "; ".join(_check_file(path, checksums=False))
    if is_before_manifests(path):
        return ""
    try:
        read_manifest(path)
    except CheckpointError as error:
        return str(error)
    return ""


def problem(path: Path, *, checksums: bool) -> str:
    """Why a checkpoint cannot be loaded, or an empty text. checksums: compare them too; reads the whole checkpoint."""
    reason = incomplete(path)
    if not reason and checksums and not is_before_manifests(path):
        reason = "; ".join(verify(path))
    return reason


def verify(path: Path, files: Iterable[str] | None = None) -> list[str]:
    """What is wrong with a checkpoint, each problem naming the file; nothing if every checksum is right.

    path:  a folder, or a file that plain Lightning or its consolidation script wrote.
    files: the names to look at; all of the manifest by default. The manifest itself is always checked.
    """
    if path.is_file():
        return _check_file(path, checksums=True)
    try:
        manifest = parse_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    chosen = manifest.files if files is None else {name: manifest.files[name] for name in files}
    problems = []
    for name, entry in chosen.items():
        try:
            size, checksum = (path / name).stat().st_size, crc32_of(path / name)
        except OSError as error:
            problems.append(f"{path / name} cannot be read ({error.strerror})")
            continue
        if size != entry["bytes"]:
            problems.append(f"{path / name} has {size} bytes instead of {entry['bytes']}")
        elif checksum != entry["crc32"]:
            problems.append(f"{path / name} has changed: checksum {checksum:08x} instead of {entry['crc32']:08x}")
    return problems


def _check_file(path: Path, *, checksums: bool) -> list[str]:
    """What is wrong with a file that torch.save wrote; its archive has a checksum for each entry, but its headers."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip() if checksums else None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        return [f"{path} is no whole checkpoint file ({error})"]
    return [f"{path} has changed: {bad} does not have its checksum"] if bad else []


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints in a folder, in whatever state, links left out; those moved aside stand for absent ones."""
    if not folder.is_dir():
        return []
    found = [
        entry
        for entry in sorted(folder.iterdir())
        if not entry.name.startswith(".") and not entry.is_symlink() and (is_sharded(entry) or entry.suffix == ".ckpt")
    ]
    aside = {name for _, name, kind in left_beside(folder) if kind == PREVIOUS and not (folder / name).exists()}
    return found + [in_place(folder / name) for name in sorted(aside)]


def age_key(path: Path) -> tuple[float, int]:
    """A key to sort checkpoints by, larger for newer ones: (when it was saved, in seconds, and its step)."""
    try:
        manifest = parse_manifest(path)
        return datetime.fromisoformat(manifest.created).timestamp(), manifest.step
    except (CheckpointError, ValueError):
        return path.stat().st_mtime, 0


def newest_complete(
    folder: Path, *, skipped: Callable[[Path, str], None] | None = None, checksums: bool = False
) -> Path | None:
    """The newest complete checkpoint in a folder, or None.

    skipped:   is told every newer one that is incomplete or damaged, and why.
    checksums: verify the checksums too; reads the whole checkpoint.
    """
    for path in sorted(checkpoints_in(folder), key=age_key, reverse=True):
        reason = problem(path, checksums=checksums)
        if not reason:
            return path
        if skipped is not None:
            skipped(path, reason)
    return None
