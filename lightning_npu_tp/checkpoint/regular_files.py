"""Files of a folder that somebody else may have written: regular ones, inside of the folder, no more than asked for.

A name in a manifest, an index or a folder is data. It may lead out of the folder, be a link to a device that never
ends or a FIFO at which `open` waits for ever. Whoever reads a checkpoint opens its files here. Errors are OSErrors
with words in `strerror`, so that a caller tells them as it tells any file that cannot be read.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path
from typing import IO, Any, BinaryIO

from typing_extensions import override

_JSON_BYTES = 1 << 26


def is_plain_name(name: object) -> bool:
    """Whether `name` names a file of a folder itself: no path, no parent, nothing that ends a C string."""
    return isinstance(name, str) and name not in ("", ".", "..") and len(name) < 256 and not set(name) & {"/", "\0"}


def regular_size(file: Path, *, inside: bool = True) -> int:
    """Bytes of a regular file, which is not opened.

    inside: a link must lead to a file of the same folder.
    Raises OSError for anything else.
    """
    found = file.lstat()
    if stat.S_ISLNK(found.st_mode):
        target = file.resolve()
        if inside and target.parent != file.parent.resolve():
            raise OSError(errno.EACCES, "a link that leads out of the folder", str(file))
        found = target.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    return found.st_size


def open_regular(file: Path, *, inside: bool = True) -> BinaryIO:
    """A regular file, opened for reading; see `regular_size`. Never waits."""
    regular_size(file, inside=inside)
    # Should it have become a FIFO meanwhile, open must not wait for its writer.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    return open(descriptor, "rb")


def read_small(file: Path, limit: int = _JSON_BYTES, *, inside: bool = True) -> bytes:
    """The content of a file of at most `limit` bytes; see `regular_size`. A longer one is an OSError."""
    with open_regular(file, inside=inside) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"more than {limit:,} bytes", str(file))
    return content


class FilePart(io.RawIOBase):
    """`length` bytes of an open file from byte `first` on, as a file of their own; the other's position stays."""

    def __init__(self, file: IO[bytes], first: int, length: int) -> None:
        super().__init__()
        self._descriptor, self._first, self._length, self._position = file.fileno(), first, length, 0

    @override
    def readable(self) -> bool:
        """True."""
        return True

    @override
    def seekable(self) -> bool:
        """True."""
        return True

    @override
    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to a byte of the part; returns it."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "before the beginning")
        self._position = start + offset
        return self._position

    @override
    def readinto(self, buffer: Any, /) -> int:
        """Read what fits; returns the number of bytes."""
        wanted = memoryview(buffer)[: max(0, self._length - self._position)]
        count = os.preadv(self._descriptor, [wanted], self._first + self._position) if len(wanted) else 0
        self._position += count
        return count
