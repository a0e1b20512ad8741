"""The dynamic symbols of a shared library, read from its ELF tables: what it provides and what it wants of others.

Sixty-four-bit little-endian files only, which is what x86-64 and aarch64 wheels hold. No binutils needed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

_DYNSYM = 11
_DYNAMIC = 6
_NEEDED, _SONAME = 1, 14
_WEAK = 2


@dataclass
class Symbols:
    """defined, undefined, weak (undefined, and no error if they stay so): names of symbols; needed: libraries."""

    defined: set[str] = field(default_factory=set)
    undefined: set[str] = field(default_factory=set)
    weak: set[str] = field(default_factory=set)
    needed: list[str] = field(default_factory=list)
    soname: str = ""


def symbols(path: Path) -> Symbols:
    """Read the tables of one library. Raises ValueError for a file that is no 64-bit ELF."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{path} is not a 64-bit little-endian ELF file.")
    offset, size, count = struct.unpack_from("<Q", data, 40)[0], *struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + k * size) for k in range(count)]
    found = Symbols()
    for _, kind, _, _, begin, length, link, _, _, entry in sections:
        if kind not in (_DYNSYM, _DYNAMIC):
            continue
        strings = sections[link][4]
        for at in range(begin, begin + length, entry):
            if kind == _DYNAMIC:
                tag, value = struct.unpack_from("<qQ", data, at)
                if tag == _NEEDED:
                    found.needed.append(_string(data, strings + value))
                elif tag == _SONAME:
                    found.soname = _string(data, strings + value)
                continue
            name_at, info, _, section = struct.unpack_from("<IBBH", data, at)
            if name_at:
                kind_of = found.defined if section else found.weak if info >> 4 == _WEAK else found.undefined
                kind_of.add(_string(data, strings + name_at))
    return found


def _string(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()
