"""Which files a user's paths name, of what kind each is, and its bytes, whether it is compressed or not.

Files of other kinds in a folder are left out, and counted by name. `documents` and `records` read what a file holds.
"""

from __future__ import annotations

import glob
import gzip
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lightning_npu_tp import DataError

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow")
_PACKED = (".gz", ".zst")  # of text files; the other kinds compress themselves
_PACKABLE = (".txt", ".jsonl", ".json", ".csv")
KINDS = ", ".join(SUFFIXES)
# What `datasets` writes beside its files.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_MOST_NAMES = 5


@dataclass(frozen=True)
class SourceFile:
    """A file to read, and its name below the folder that the user gave."""

    path: Path
    name: str

    @property
    def kind(self) -> str:
        """Its suffix in lower case, one of `SUFFIXES`; without that of a compression."""
        kind = kind_of(self.path)
        assert kind is not None
        return kind


def kind_of(path: Path) -> str | None:
    """The suffix that says how a file is read; None where none does."""
    suffix = path.suffix.lower()
    if path.name in _METADATA:
        return None
    if suffix in _PACKED:
        inner = Path(path.stem).suffix.lower()
        return inner if inner in _PACKABLE else None
    return suffix if suffix in SUFFIXES else None


def find_files(
    paths: Iterable[str | Path], *, setting: str = "data.paths", skipped: Counter[str] | None = None
) -> list[SourceFile]:
    """All files that `paths` (files, folders, glob patterns) name, each once, in the order given.

    A folder is searched to its depth, links followed, names beginning with a dot left out; folders
    and patterns take only files of the `SUFFIXES`, also as .gz and .zst, and are sorted.

    skipped: is told how many files of other kinds there are, and the names of some.
    Raises DataError, naming `setting` and the path, for a path that does not exist, a folder or
    pattern without such a file, a file of another kind, and a link or file that cannot be read as one.
    """
    found: dict[Path, SourceFile] = {}
    others: dict[str, None] = {}
    for entry in paths:
        for file in _expand(Path(entry).expanduser(), setting, others):
            found.setdefault(file.path.resolve(), file)
    if not found:
        raise DataError(f"{setting} is empty. Give at least one {KINDS} file, folder or glob pattern.")
    if others and skipped is not None:
        names = list(others)
        more = ", …" if len(names) > _MOST_NAMES else ""
        skipped[f"files of other kinds: {', '.join(names[:_MOST_NAMES])}{more}"] += len(names)
    return list(found.values())


def _expand(path: Path, setting: str, others: dict[str, None]) -> list[SourceFile]:
    """The files of one entry of `find_files`."""
    if path.is_dir():
        files = _walk(path, setting, others)
    elif path.exists():
        if kind_of(path) is None:
            raise DataError(
                f"{setting} names {str(path)!r}, but only {KINDS} files are read, the text files also as .gz and .zst. "
                "Convert it or, if it is plain text, rename it to .txt."
            )
        files = [_checked(SourceFile(path=path, name=path.name), setting)]
    else:
        if not glob.has_magic(str(path)):
            what = "is a link to what does not exist" if path.is_symlink() else "does not exist"
            raise DataError(f"{setting} names {str(path)!r}, which {what} (working folder: {os.getcwd()!r}).")
        files = []
        for match in sorted(map(Path, glob.glob(str(path), recursive=True))):
            if not match.is_dir():
                # A pattern has no root of its own; the parent's name keeps a/x.txt and b/x.txt apart.
                _take(SourceFile(path=match, name=f"{match.parent.name}/{match.name}"), files, setting, others)
    if not files:
        seen = f", but {len(others)} of other kinds" if others else ""
        raise DataError(f"{setting} names {str(path)!r}, which holds no {KINDS} file{seen}. Check the path.")
    return files


def _walk(root: Path, setting: str, others: dict[str, None]) -> list[SourceFile]:
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
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith("."):
                _take(SourceFile(path=path, name=path.relative_to(root).as_posix()), files, setting, others)
    return sorted(files, key=lambda file: file.name)


def _take(file: SourceFile, files: list[SourceFile], setting: str, others: dict[str, None]) -> None:
    if kind_of(file.path) is None:
        others[file.name] = None
    else:
        files.append(_checked(file, setting))


def _checked(file: SourceFile, setting: str) -> SourceFile:
    """`file` if it is one: a pipe would be waited for for ever."""
    try:
        regular = stat.S_ISREG(file.path.stat().st_mode)
    except OSError as error:
        link = f"a link to {os.readlink(file.path)!r}: " if file.path.is_symlink() else ""
        raise DataError(
            f"{setting} takes in {str(file.path)!r}, which cannot be read: {link}{error.strerror}. Repair or remove it."
        ) from error
    if not regular:
        raise DataError(f"{setting} takes in {str(file.path)!r}, which is no file but a pipe or device. Remove it.")
    return file


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked. Raises DataError where it cannot be opened or, while it is read, is damaged."""
    suffix = path.suffix.lower()
    try:
        stream: Any
        if suffix == ".gz":
            stream = gzip.open(path, "rb")
        elif suffix == ".zst":
            import io

            import pyarrow as pa

            stream = io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), 2**20)
        else:
            stream = path.open("rb")
        with stream:
            yield stream
    except ImportError as error:
        raise DataError(f"{str(path)!r} needs pyarrow. Install it: pip install 'lightning-npu-tp[train]'.") from error
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{str(path)!r} cannot be read: {why}. Check the file and its permissions.") from error


def decode(data: bytes, *, where: str, offset: int) -> str:
    """UTF-8 text of `data`, which begins at byte `offset` of its file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_text(where, byte=data[error.start], offset=offset + error.start) from error


def not_text(where: str, *, byte: int, offset: int) -> DataError:
    """What is said of a byte that is no UTF-8."""
    return DataError(
        f"{where} is not UTF-8 text: byte 0x{byte:02x} at offset {offset}. Convert it "
        "(for Chinese often: iconv -f GB18030 -t UTF-8), or leave the file out of data.paths."
    )
