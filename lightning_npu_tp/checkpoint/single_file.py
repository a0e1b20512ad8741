"""A checkpoint in one file, as torch.save writes it, sealed with a checksum that plain readers do not see.

torch's format is a zip archive, whose own checksums leave out its headers. The archive comment, which every reader
skips, therefore holds the length and CRC-32 of all bytes before it. Files without the seal (Lightning's own) are
checked by the archive's checksums.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from pathlib import Path

from typing_extensions import override

from lightning_npu_tp.checkpoint.files import CheckedStream, crc32_of

_SEAL = re.compile(rb"lightning_npu_tp bytes=(\d{16}) crc32=([0-9a-f]{8})\Z")
_SEAL_LENGTH = len(b"lightning_npu_tp bytes= crc32=") + 16 + 8
_END_LENGTH = 22


class SealingStream(CheckedStream):
    """Holds back the end of the archive so that its comment can be added."""

    def __init__(self, raw: CheckedStream) -> None:
        self._out = raw
        self._tail = b""
        self.bytes = 0
        self.failure = None

    @override
    def write(self, data: object) -> int:
        """Write `data`; the last 22 bytes wait."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        self.bytes += view.nbytes
        if view.nbytes >= _END_LENGTH:
            self._out.write(self._tail)
            self._out.write(view[:-_END_LENGTH])
            self._tail = bytes(view[-_END_LENGTH:])
        else:
            joined = self._tail + bytes(view)
            self._out.write(joined[:-_END_LENGTH])
            self._tail = joined[-_END_LENGTH:]
        return view.nbytes

    @override
    def flush(self) -> None:
        """Nothing: `seal` follows."""

    def seal(self) -> None:
        """Write the end record with the checksum as its comment."""
        self._out.write(self._tail[:-2] + struct.pack("<H", _SEAL_LENGTH))
        self._out.write(b"lightning_npu_tp bytes=%016d crc32=%08x" % (self._out.bytes, self._out.crc32))


def check_file(path: Path, *, checksum: bool) -> list[str]:
    """What is wrong with a one-file checkpoint, naming it; nothing if it is whole.

    checksum: read the whole file; without, only that it has the length that its seal or its archive names.
    """
    size = path.stat().st_size
    with open(path, "rb") as stream:
        stream.seek(max(0, size - _SEAL_LENGTH))
        found = _SEAL.search(stream.read())
    if found is not None:
        if int(found[1]) != size - _SEAL_LENGTH:
            return [f"{path} has {size - _SEAL_LENGTH} bytes instead of {int(found[1])}"]
        if checksum and (now := crc32_of(path, int(found[1]))) != int(found[2], 16):
            return [f"{path} has changed: checksum {now:08x} instead of {found[2].decode()}"]
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.comment:
                return [f"{path} is damaged at its end: the seal that holds its checksum cannot be read"]
            bad = archive.testzip() if checksum else None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        return [f"{path} is no whole checkpoint file ({error})"]
    return [f"{path} has changed: {bad} does not have its checksum"] if bad else []
