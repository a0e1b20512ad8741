"""Folders that are on disk whole or not at all: checksums, fsync, names beside the target, whole removal.

What a checkpoint (or cache) called NAME leaves in its parent folder while work is under way: `.NAME.partial-…` is being
written, `.NAME.previous-…` is the one that NAME is about to replace, `.NAME.removed-…` is being deleted, `.NAME.lock`
says who is at it (locks.py). Nothing here knows what is in the files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lightning_npu_tp.checkpoint.regular_files import open_regular

PARTIAL, PREVIOUS, REMOVED = "partial", "previous", "removed"
_BESIDE = re.compile(rf"^\.(?P<name>.+)\.(?P<kind>{PARTIAL}|{PREVIOUS}|{REMOVED})-[0-9a-f]{{12}}$")
_CHUNK = 1 << 22
_BLANK = "0" * 8
_CHECKSUM = re.compile(rb'"checksum": "([0-9a-f]{8})"\n}\n\Z')


class CheckedStream:
    """A file opened for writing that counts bytes and CRC-32 of what passes; written front to back only.

    failure: the first error of the operating system, which torch's writers report in words of their own.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self.bytes = self.crc32 = 0
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`; returns its bytes."""
        try:
            self._raw.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise
        view = memoryview(data)
        self.crc32 = zlib.crc32(view, self.crc32)
        self.bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        """Bytes written so far."""
        return self.bytes

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._raw.flush()

    def close(self) -> None:
        """Leave the file open: whoever opened it closes it."""


class Written:
    """Collects size and checksum of every file that is written through it; one per save and rank.

    files: name -> {"bytes": …, "crc32": …}, of files that are on disk (fsynced) with that size.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, int]] = {}
        self.failure: OSError | None = None

    @contextmanager
    def open(self, path: Path) -> Iterator[CheckedStream]:
        """Open a new file for writing; on leaving it is on disk and of the size that was written."""
        try:
            with open(path, "xb") as raw:
                stream = CheckedStream(raw)
                try:
                    yield stream
                finally:
                    self.failure = self.failure or stream.failure
                raw.flush()
                os.fsync(raw.fileno())
                on_disk = os.fstat(raw.fileno()).st_size
        except OSError as error:
            self.failure = self.failure or error
            raise
        if on_disk != stream.bytes:
            raise OSError(f"{path.name} has {on_disk} bytes on disk after {stream.bytes} were written")
        self.files[path.name] = {"bytes": stream.bytes, "crc32": stream.crc32}


def crc32_of(path: Path, first: int = 0, length: int | None = None) -> int:
    """CRC-32 of a file, or of `length` of its bytes from byte `first` on."""
    with open_regular(path, inside=False) as stream:
        value, left = 0, os.fstat(stream.fileno()).st_size if length is None else length
        stream.seek(first)
        while left > 0 and (chunk := stream.read(min(_CHUNK, left))):
            value = zlib.crc32(chunk, value)
            left -= len(chunk)
    return value


def sealed_json(values: dict[str, Any]) -> bytes:
    """`values` as JSON with a CRC-32 of the text at its end: over the text's own bytes with zeros in that place."""
    text = json.dumps(values | {"checksum": _BLANK}, indent=2, default=str) + "\n"
    return text.replace(f'"{_BLANK}"\n}}\n', f'"{zlib.crc32(text.encode()):08x}"\n}}\n').encode()


def unsealed_json(content: bytes) -> dict[str, Any] | None:
    """What `sealed_json` made the content of; None if its checksum is not right."""
    found = _CHECKSUM.search(content)
    if found is None:
        return None
    blank = content[: found.start(1)] + _BLANK.encode() + content[found.end(1) :]
    if zlib.crc32(blank) != int(found[1], 16):
        return None
    values: dict[str, Any] = json.loads(content)
    values.pop("checksum", None)
    return values


def fsync_file(path: Path) -> None:
    """Have a file that another library wrote survive a power cut."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def fsync_folder(path: Path) -> None:
    """Have names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def beside(path: Path, kind: str) -> Path:
    """A fresh name for `path` in the same folder, so that a rename never crosses filesystems."""
    return path.with_name(f".{path.name}.{kind}-{uuid.uuid4().hex[:12]}")


def left_beside(folder: Path) -> list[tuple[Path, str, str]]:
    """What is being written, or was left, in a folder: (path, NAME, kind), oldest first."""
    found = []
    for entry in folder.iterdir():
        if match := _BESIDE.match(entry.name):
            # Whoever made it may take it away meanwhile.
            with suppress(FileNotFoundError):
                found.append((entry.lstat().st_mtime, (entry, match["name"], match["kind"])))
    return [item for _, item in sorted(found)]


def in_place(path: Path) -> Path:
    """`path`, or the checkpoint that was moved aside for it if a save died between its two renames."""
    if os.path.lexists(path) or not path.parent.is_dir():
        return path
    aside = [left for left, name, kind in left_beside(path.parent) if (name, kind) == (path.name, PREVIOUS)]
    return aside[-1] if aside else path


def delete(path: Path) -> None:
    """Delete a file, a link or a folder; what another process deletes meanwhile is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink(missing_ok=True)


def remove_whole(path: Path) -> None:
    """Take a checkpoint away at once, by a rename, and delete it then: nobody meets half of it."""
    if not os.path.lexists(path):
        return
    doomed = beside(path, REMOVED)
    os.rename(path, doomed)
    delete(doomed)


def replace_whole(new: Path, path: Path, *, is_read: Callable[[], bool] = lambda: False) -> None:
    """Give the complete checkpoint `new` the name `path`; one that has it now is deleted after that.

    Between the two renames the old one is at `in_place(path)`.
    is_read: whether somebody still reads the old one, who will delete it.
    """
    aside = None
    if os.path.lexists(path):
        aside = beside(path, PREVIOUS)
        os.rename(path, aside)
    try:
        os.rename(new, path)
    except OSError:
        if aside is not None:
            os.rename(aside, path)
        raise
    fsync_folder(path.parent)
    if aside is not None and not is_read():
        delete(aside)


def size_in_words(num_bytes: int) -> str:
    """A number of bytes, e.g. "3.2 GB"."""
    value, unit = float(num_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{num_bytes} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
