"""Files of a folder that somebody else may have written: regular ones, inside of the folder, no more than asked for.

A name in a manifest, an index or a folder is data. It may lead out of the folder, be a link to a device that never
ends or a FIFO at which `open` waits for ever. Whoever reads a checkpoint opens its files here. Errors are OSErrors
with words in `strerror`, so that a caller tells them as it tells any file that cannot be read.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

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
