"""The manifest of a training checkpoint: what it is, and every file with its size and checksum.

`manifest.json` is written last, so its presence, with its own checksum right and every file of the named size, is what
makes a checkpoint complete. Readable without torch and before anything else of the checkpoint is trusted.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from lightning_npu_tp.checkpoint.files import PREVIOUS, crc32_of, in_place, left_beside, sealed_json, unsealed_json
from lightning_npu_tp.checkpoint.regular_files import FilePart, is_plain_name, open_regular, read_small, regular_size
from lightning_npu_tp.errors import CheckpointError

FORMAT = 1
MANIFEST_FILE = "manifest.json"
# What the state besides tensors is in; Lightning's consolidation script looks for the name.
REST_FILE = "meta.pt"
DCP_FILE = ".metadata"
# A shard takes some 150 bytes in it.
MAX_INDEX_BYTES = 1 << 28


@dataclass
class Manifest:
    """What `manifest.json` holds.

    layout:    sizes of the axes data, tensor and expert of the run that saved.
    models:    path of a converted submodule -> {family, config, dtype, parameters}.
    tokenizer: None, or {name, path, source, vocab_size, fingerprint}; path is "." where its files are beside the
               manifest, and source where they were read.
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
        """A manifest of what `manifest.json` holds; unknown keys are dropped, so that later additions can be read.

        Raises ValueError that names a field that is not what it has to be.
        """
        known = {item.name for item in fields(cls)}
        found = cls(**{name: value for name, value in values.items() if name in known})
        for name, rule in _RULES.items():
            if not rule(getattr(found, name)):
                raise ValueError(f"its {name} cannot be what it says")
        return found


# Lightning counts steps and epochs in 64 bits; no cluster has a billion ranks.
_MAX_NUMBER, _MAX_RANKS = 2**62, 10**9


def _is_number(value: Any, least: int = 0, most: int = _MAX_NUMBER) -> bool:
    return type(value) is int and least <= value <= most


def _is_table(value: Any, entry: Callable[[Any], bool], key: Callable[[str], bool] = bool) -> bool:
    """Whether it is a dict whose keys and values are what they have to be."""
    return isinstance(value, dict) and all(key(name) and entry(item) for name, item in value.items())


def _has(value: Any, rules: dict[str, Callable[[Any], bool]]) -> bool:
    return isinstance(value, dict) and all(rule(value.get(name)) for name, rule in rules.items())


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) < 4096


def _date(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


_MODEL: dict[str, Callable[[Any], bool]] = {
    "family": _is_text,
    "config": lambda value: isinstance(value, dict),
    "dtype": _is_text,
    "parameters": _is_number,
}
_TOKENIZER: dict[str, Callable[[Any], bool]] = {
    "name": _is_text,
    "path": lambda value: value is None or _is_text(value),
    "source": lambda value: value is None or _is_text(value),
    "vocab_size": _is_number,
    "fingerprint": _is_text,
}
# What a stranger may have written, before anything relies on it.
_RULES: dict[str, Callable[[Any], bool]] = {
    "step": _is_number,
    "epoch": _is_number,
    "world": lambda value: _is_number(value, 1, _MAX_RANKS),
    "layout": lambda value: _is_table(value, lambda size: _is_number(size, 1, _MAX_RANKS)),
    "models": lambda value: _is_table(value, lambda model: _has(model, _MODEL), key=_is_text),
    "tokenizer": lambda value: value is None or _has(value, _TOKENIZER),
    "contents": lambda value: _is_table(value, lambda item: type(item) is bool or _is_number(item)),
    "versions": lambda value: _is_table(value, _is_text),
    "files": lambda value: _is_table(
        value, lambda entry: _has(entry, {"bytes": _is_number, "crc32": _is_number}), key=is_plain_name
    ),
    "created": lambda value: _is_text(value) and _date(value) is not None,
    "format": lambda value: _is_number(value, 1),
}


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
        raw = read_small(file)
    except FileNotFoundError:
        what = "is incomplete" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"The checkpoint {path} {what}: no {MANIFEST_FILE}, which is written last. {WHAT_TO_DO}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    try:
        values = unsealed_json(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {error}. {WHAT_TO_DO}") from None
    if values is None:
        raise CheckpointError(f"{file} is damaged: its checksum is not that of its content. {WHAT_TO_DO}")
    if not _is_number(values.get("format"), 1):
        raise CheckpointError(f"{file} does not say its format. {WHAT_TO_DO}")
    if values["format"] > FORMAT:
        versions = values.get("versions")
        wrote = versions.get("lightning_npu_tp", "?") if isinstance(versions, dict) else "?"
        raise CheckpointError(
            f"The checkpoint {path} has format {values['format']}, and this version of lightning_npu_tp reads up to "
            f"{FORMAT}. Use the version that wrote it ({wrote}) or a newer one."
        )
    try:
        return Manifest.from_values(values)
    except ValueError as error:
        raise CheckpointError(f"{file} is no manifest: {error}. {WHAT_TO_DO}") from None


def _sizes(path: Path, manifest: Manifest) -> list[str]:
    problems = []
    for name, entry in manifest.files.items():
        try:
            size = regular_size(path / name)
        except OSError as error:
            problems.append(f"{path / name} cannot be read ({error.strerror})")
            continue
        if size != entry["bytes"]:
            problems.append(f"{path / name} has {size} bytes instead of {entry['bytes']}")
        elif name == DCP_FILE and size > MAX_INDEX_BYTES:
            problems.append(f"{path / name} has {size:,} bytes, which no index of tensors has")
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
        return archive_problem(path, checksums=False)
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
    if not reason and checksums and not path.is_file():
        reason = _index_problem(path)
    return reason


def _index_problem(path: Path) -> str:
    # torch takes seconds to import, which a damaged checkpoint need not wait for.
    from lightning_npu_tp.checkpoint.index import read_index

    try:
        read_index(path)
    except CheckpointError as error:
        return str(error)
    return ""


def verify(path: Path, files: Iterable[str] | None = None) -> list[str]:
    """What is wrong with a checkpoint, each problem naming the file; nothing if every checksum is right.

    path:  a folder, or a file that plain Lightning or its consolidation script wrote.
    files: the names to look at; all of the manifest by default. The manifest itself is always checked.
    """
    if path.is_file():
        return [found] if (found := archive_problem(path, checksums=True)) else []
    try:
        manifest = parse_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    if problems := _sizes(path, manifest):
        return problems
    chosen = manifest.files if files is None else {name: manifest.files[name] for name in files}
    for name, entry in chosen.items():
        try:
            checksum = crc32_of(path / name)
        except OSError as error:
            problems.append(f"{path / name} cannot be read ({error.strerror})")
            continue
        if checksum != entry["crc32"]:
            problems.append(f"{path / name} has changed: checksum {checksum:08x} instead of {entry['crc32']:08x}")
    return problems


def archive_problem(path: Path, *, checksums: bool) -> str:
    """What is wrong with a file that torch.save wrote, or an empty text.

    Its archive has a checksum for each entry, but none for its headers.
    """
    try:
        with open_regular(path, inside=False) as stream:
            if found := packing_problem(stream, 0, os.fstat(stream.fileno()).st_size):
                return f"{path} {found}"
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip() if checksums else None
    except Exception as error:
        # Damaged archives raise all kinds of errors.
        return f"{path} is no whole checkpoint file ({getattr(error, 'strerror', None) or error})"
    return f"{path} has changed: {bad} does not have its checksum" if bad else ""


def packing_problem(stream: IO[bytes], first: int, length: int) -> str:
    """Why an archive of torch.save would take more memory than its bytes, as the end of a sentence; or an empty text.

    stream, first, length: the archive is `length` bytes of an open file from byte `first` on.

    torch stores entries as they are: packed ones, and such as lie over each other, could unpack to a thousand times the
    file.
    """
    with zipfile.ZipFile(FilePart(stream, first, length)) as archive:  # type: ignore[arg-type]
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            return "is packed, which no checkpoint is"
        if any(entry.file_size != entry.compress_size for entry in entries) or length < sum(
            entry.file_size for entry in entries
        ):
            return f"says that it holds more than its {length:,} bytes"
        for entry in entries:
            if entry.filename.endswith("data.pkl") and _ROOM_BY_NUMBER.search(archive.read(entry)):
                return "holds a bytearray, which could ask for any memory. Store bytes or a tensor instead"
    return ""


# bytearray(10**11) is plain data to torch's weights-only loader.
_ROOM_BY_NUMBER = re.compile(rb"(?:__builtin__|builtins)\nbytearray\n")


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


def age_key(path: Path) -> tuple[float, float]:
    """A key to sort checkpoints by, larger for newer ones: (its step, when it was saved, in seconds).

    Steps only grow within a run, and a clock may be set back. One that cannot be read comes last, as if it were the
    newest: whoever looks for that is to hear of it.
    """
    try:
        changed = path.stat().st_mtime
        if path.is_file() or is_before_manifests(path):
            return _step_without_manifest(path), changed
        manifest = parse_manifest(path)
        return manifest.step, datetime.fromisoformat(manifest.created).timestamp()
    except CheckpointError:
        return math.inf, changed
    except (OSError, ValueError, OverflowError):
        return math.inf, 0.0


def _step_without_manifest(path: Path) -> float:
    """The step of a file of plain Lightning or a folder from before manifests; -1 where it says none."""
    # torch takes seconds to import, which a folder need not wait for.
    from lightning_npu_tp.checkpoint.reader import read_object

    step: Any = read_object(path if path.is_file() else path / REST_FILE, True, mapped=True)
    step = step.get("global_step") if isinstance(step, dict) else None
    return float(step) if step is not None and _is_number(step) else -1.0


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
