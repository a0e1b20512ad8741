"""Where text comes from: the interpreter's standard library, or a user's files.

Every source is an iterator of `Document`s in an order that depends on nothing but its arguments (no
hash seed, no order of a directory listing), opens each file once, holds no more of it than a document or a
part of one, and counts what it leaves out. `split_point` gives each document its place between training and
validation by name, so that adding a file moves no other document. Nothing here knows tokens.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning_npu_tp import DataError
from lit_models.data.records import read_records
from lit_models.data.source_files import SourceFile, decode, not_text, open_bytes

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


def read_files(files: Iterable[SourceFile], *, text_key: str = "text", in_parts: bool = False) -> Iterator[Document]:
    """The documents of each file: a .txt is one; so is a line, an entry of an array, or a row.

    text_key: the key or column that holds the text; null there is a document without text.
    in_parts: a .txt comes in parts of 4 MiB, so that no file is held whole.

    Raises DataError with file and line, row or byte for whatever cannot be read.
    """
    for file in files:
        if file.kind == ".txt":
            yield from _read_parts(file) if in_parts else [Document(name=file.name, text=_read_text(file.path))]
            continue
        for record in read_records(file, keys=(text_key,), setting="data.text_key"):
            text = _checked_text(record.values[text_key], record.where, text_key)
            yield Document(name=record.name, text=text)


def _read_bytes(path: Path) -> bytes:
    with open_bytes(path) as stream:
        return stream.read()


def _read_text(path: Path) -> str:
    """A UTF-8 file without its byte-order mark; binary files are refused with the byte that gives them away."""
    data = _read_bytes(path)
    text = decode(data, where=str(path), offset=0)
    zero = data.find(b"\0")
    if zero >= 0:
        raise not_text(str(path), byte=0, offset=zero)
    return text.removeprefix("\ufeff")


def _read_parts(file: SourceFile) -> Iterator[Document]:
    """A UTF-8 file in parts, checked as `_read_text` checks it; the last part may be empty."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with open_bytes(file.path) as stream:
        while True:
            data = stream.read(_PART)
            zero = data.find(b"\0")
            if zero >= 0:
                raise not_text(str(file.path), byte=0, offset=offset + zero)
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                at = offset - held + error.start
                raise not_text(str(file.path), byte=error.object[error.start], offset=at) from error
            yield Document(name=file.name, text=text if offset else text.removeprefix("\ufeff"), ends=not data)
            offset += len(data)
            if not data:
                return


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
