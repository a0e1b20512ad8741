"""Where text comes from: the interpreter's standard library, or a user's .txt, .jsonl and .parquet files.

Every source is an iterator of `Document`s in an order that depends on nothing but its arguments (no
hash seed, no order of a directory listing), opens each file once, holds no more of it than a document or a
part of one, and counts what it leaves out. `read_records` gives lines and rows that are more than a text.
`split_point` gives each document its place between training and validation by name, so that adding
a file moves no other document. Nothing here knows tokens.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_npu_tp import DataError

SUFFIXES = (".txt", ".jsonl", ".parquet")
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_PART = 2**22  # bytes of a .txt that is read in parts
_INSTALLED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """One text, or one part of it; `name` is unique within its file and free of the machine's folders.

    ends: false for a part that others of the same name follow.
    """

    name: str
    text: str
    ends: bool = True


@dataclass(frozen=True)
class Record:
    """One line or row: its name as a document's, the place that an error names, and what it holds."""

    name: str
    where: str
    values: dict[str, Any]


@dataclass(frozen=True)
class SourceFile:
    """A file to read, and its name below the folder that the user gave."""

    path: Path
    name: str


def split_point(seed: int, name: str) -> float:
    """A number in [0, 1) for a document; it validates if the number is below the validation fraction.

    From SHA-256 and not `hash`, which differs from process to process.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    # The upper 53 bits: all that a float holds, so that the result never rounds up to 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def stdlib_files(*, include_tests: bool = False, root: Path | None = None) -> list[SourceFile]:
    """The .py files of the running interpreter's standard library, sorted by name.

    Installed packages are left out, and so are the library's own tests unless asked for: they are
    60% of the bytes and much of that is generated tables. `root` stands in for the library's folder.

    Raises DataError where an installation ships no sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    leave_out = _INSTALLED_FOLDERS if include_tests else _INSTALLED_FOLDERS | _TEST_FOLDERS
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in leave_out]
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                files.append(SourceFile(path=path, name=path.relative_to(root).as_posix()))
    if not files:
        raise DataError(
            f"data.source=stdlib finds no .py file under {str(root)!r}: this Python ships without its sources. "
            "Use a Python that has them, or data=text with data.paths=[your files]."
        )
    return sorted(files, key=lambda file: file.name)


def read_stdlib(files: Iterable[SourceFile], skipped: Counter[str]) -> Iterator[Document]:
    """One document a file; a file that is not UTF-8 is skipped and counted in `skipped`."""
    for file in files:
        try:
            yield Document(name=file.name, text=_read_bytes(file.path).decode("utf-8"))
        except UnicodeDecodeError:
            skipped["undecodable files"] += 1


def find_files(paths: Iterable[str | Path], *, setting: str = "data.paths") -> list[SourceFile]:
    """All files that `paths` (files, folders, glob patterns) name, each once, in the order given.

    A folder is searched to its depth, links followed, names beginning with a dot left out; folders
    and patterns take only .txt, .jsonl and .parquet and are sorted.

    Raises DataError, naming `setting` and the path, for a path that does not exist, a folder or
    pattern without such a file, and a file of another kind.
    """
    found: dict[Path, SourceFile] = {}
    for entry in paths:
        for file in _expand(Path(entry).expanduser(), setting):
            found.setdefault(file.path.resolve(), file)
    if not found:
        raise DataError(f"{setting} is empty. Give at least one {', '.join(SUFFIXES)} file, folder or glob pattern.")
    return list(found.values())


def _expand(path: Path, setting: str) -> list[SourceFile]:
    """The files of one entry of `find_files`."""
    if path.is_dir():
        files = _walk(path)
    elif path.exists():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(
                f"{setting} names {str(path)!r}, but only {', '.join(SUFFIXES)} files are read. "
                "Convert it or, if it is plain text, rename it to .txt."
            )
        files = [SourceFile(path=path, name=path.name)]
    else:
        if not glob.has_magic(str(path)):
            raise DataError(f"{setting} names {str(path)!r}, which does not exist (working folder: {os.getcwd()!r}).")
        files = []
        for match in sorted(map(Path, glob.glob(str(path), recursive=True))):
            if match.is_file() and match.suffix.lower() in SUFFIXES:
                # A pattern has no root of its own; the parent's name keeps a/x.txt and b/x.txt apart.
                files.append(SourceFile(path=match, name=f"{match.parent.name}/{match.name}"))
    if not files:
        raise DataError(f"{setting} names {str(path)!r}, which holds no {', '.join(SUFFIXES)} file. Check the path.")
    return files


def _walk(root: Path) -> list[SourceFile]:
    """Files with a known suffix below `root`, sorted by name; a link that closes a circle is not followed."""
    files: list[SourceFile] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(folder, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                files.append(SourceFile(path=path, name=path.relative_to(root).as_posix()))
    return sorted(files, key=lambda file: file.name)


def read_files(files: Iterable[SourceFile], *, text_key: str = "text", in_parts: bool = False) -> Iterator[Document]:
    """The documents of each file: a .txt is one, a .jsonl one a line, a .parquet one a row.

    text_key: the key or column that holds the text; null there is a document without text.
    in_parts: a .txt comes in parts of 4 MiB, so that no file is held whole.

    Raises DataError with file and line, row or byte for whatever cannot be read.
    """
    for file in files:
        if file.path.suffix.lower() == ".txt":
            yield from _read_parts(file) if in_parts else [Document(name=file.name, text=_read_text(file.path))]
            continue
        for record in read_records(file, keys=(text_key,), setting="data.text_key"):
            text = _checked_text(record.values[text_key], record.where, text_key)
            yield Document(name=record.name, text=text)


def read_records(file: SourceFile, *, keys: Sequence[str], setting: str) -> Iterator[Record]:
    """The lines of a .jsonl as they are, the rows of a .parquet with the columns `keys`; all must have `keys`.

    setting: which names the keys, for the error.
    Raises DataError with file and line or row.
    """
    read = _read_jsonl if file.path.suffix.lower() == ".jsonl" else _read_parquet
    return read(file, keys, setting)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{str(path)!r} cannot be read: {error.strerror}. Check the file and its permissions."
        ) from error


def _read_text(path: Path) -> str:
    """A UTF-8 file without its byte-order mark; binary files are refused with the byte that gives them away."""
    data = _read_bytes(path)
    text = _decode(data, where=str(path), offset=0)
    zero = data.find(b"\0")
    if zero >= 0:
        raise _not_text(str(path), byte=0, offset=zero)
    return text.removeprefix("\ufeff")


def _read_parts(file: SourceFile) -> Iterator[Document]:
    """A UTF-8 file in parts, checked as `_read_text` checks it; the last part may be empty."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    try:
        with file.path.open("rb") as stream:
            while True:
                data = stream.read(_PART)
                zero = data.find(b"\0")
                if zero >= 0:
                    raise _not_text(str(file.path), byte=0, offset=offset + zero)
                held = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    at = offset - held + error.start
                    raise _not_text(str(file.path), byte=error.object[error.start], offset=at) from error
                yield Document(name=file.name, text=text if offset else text.removeprefix("\ufeff"), ends=not data)
                offset += len(data)
                if not data:
                    return
    except OSError as error:
        raise DataError(
            f"{str(file.path)!r} cannot be read: {error.strerror}. Check the file and its permissions."
        ) from error


def _decode(data: bytes, *, where: str, offset: int) -> str:
    """UTF-8 text of `data`, which begins at byte `offset` of its file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_text(where, byte=data[error.start], offset=offset + error.start) from error


def _not_text(where: str, *, byte: int, offset: int) -> DataError:
    return DataError(
        f"{where} is not UTF-8 text: byte 0x{byte:02x} at offset {offset}. Convert it "
        "(for Chinese often: iconv -f GB18030 -t UTF-8), or leave the file out of data.paths."
    )


def _read_jsonl(file: SourceFile, keys: Sequence[str], setting: str) -> Iterator[Record]:
    """One record a line; empty lines are passed over."""
    offset = 0
    try:
        # Binary, so that an error can name the byte, and so that only \n ends a line (JSON may hold U+2028).
        with file.path.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                where = f"{str(file.path)!r} line {number}"
                line = _decode(raw, where=where, offset=offset).removeprefix("\ufeff").strip()
                offset += len(raw)
                if line:
                    yield Record(f"{file.name}:{number}", where, _object_of_line(line, where, keys, setting))
    except OSError as error:
        raise DataError(f"{str(file.path)!r} cannot be read: {error.strerror}.") from error


def _object_of_line(line: str, where: str, keys: Sequence[str], setting: str) -> dict[str, Any]:
    example = f'{{"{keys[0]}": ...}}'
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON: {error.msg} at column {error.colno}. Each line must be one object such as {example}."
        ) from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is not a JSON object. Each line must be one such as {example}.")
    for key in keys:
        if key not in record:
            raise DataError(
                f"{where} has no key {key!r}; its keys are {sorted(record)}. Set {setting} to the one that holds it."
            )
    return record


def _read_parquet(file: SourceFile, keys: Sequence[str], setting: str) -> Iterator[Record]:
    """One record a row, read batch by batch and no other column."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(
            f"{str(file.path)!r} needs pyarrow. Install it: pip install 'lightning-npu-tp[train]'."
        ) from error
    try:
        with parquet.ParquetFile(file.path) as table:
            columns = table.schema_arrow.names
            for key in keys:
                if key not in columns:
                    raise DataError(
                        f"{str(file.path)!r} has no column {key!r}; its columns are {columns}. "
                        f"Set {setting} to the one that holds it."
                    )
            row = 0
            for batch in table.iter_batches(batch_size=128, columns=list(keys)):
                for values in batch.to_pylist():
                    yield Record(f"{file.name}:{row}", f"{str(file.path)!r} row {row}", values)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{str(file.path)!r} cannot be read as parquet: {error} Replace the file or leave it out."
        ) from error


def _checked_text(value: object, where: str, text_key: str) -> str:
    """`value` if it is text, "" for null; half a UTF-16 pair, which JSON lets through, has no UTF-8 bytes."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {text_key!r} holds {type(value).__name__}, not text. Set data.text_key to the one with the text."
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {text_key!r} holds half of a surrogate pair at character {error.start}. Repair or drop the line."
        ) from error
    return value
