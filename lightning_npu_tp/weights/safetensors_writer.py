"""Write safetensors files of a Hugging Face folder piece by piece, without a whole file in memory.

A safetensors file is a header with every tensor's name, dtype, shape and place, and the tensors' bytes. Since names and
shapes are known beforehand, the header is written first and each tensor goes to its place as it comes; the safetensors
package itself would want all tensors of a file at once. Which names and tensors, the caller says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lightning_npu_tp.checkpoint.files import fsync_folder
from lightning_npu_tp.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the folder."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def num_rows(self) -> int:
        """Length of dim 0; a scalar is one row."""
        return self.shape[0] if self.shape else 1


@dataclass
class _File:
    name: str
    entries: list[Entry] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    def header(self) -> tuple[bytes, dict[str, int]]:
        """The file's first bytes, and where in the file each tensor starts."""
        starts, table, offset = {}, {}, 0
        # The widest first, so that every tensor is aligned to its own elements.
        for entry in sorted(self.entries, key=lambda entry: -entry.dtype.itemsize):
            starts[entry.key] = offset
            table[entry.key] = {
                "dtype": _CODES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + entry.bytes],
            }
            offset += entry.bytes
        text = json.dumps({"__metadata__": {"format": "pt"}} | table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text, {key: 8 + len(text) + start for key, start in starts.items()}


class ShardPlan:
    """Which tensor goes into which file, in order; a file holds at most `max_bytes`, or one tensor that is larger.

    Raises CheckpointError for a dtype that safetensors files cannot hold and for a name that comes twice.
    """

    def __init__(self, entries: Iterable[Entry], max_bytes: int) -> None:
        groups: list[_File] = []
        seen: set[str] = set()
        for entry in entries:
            if entry.dtype not in _CODES:
                raise CheckpointError(
                    f"{entry.key} has dtype {entry.dtype}, which safetensors files cannot hold. Set --dtype."
                )
            if entry.key in seen:
                raise CheckpointError(f"{entry.key} would be written twice. Correct the keys of its ModelFamily.")
            seen.add(entry.key)
            if not groups or groups[-1].num_bytes + entry.bytes > max_bytes:
                groups.append(_File(""))
            groups[-1].entries.append(entry)
        for number, group in enumerate(groups, start=1):
            single = len(groups) == 1
            group.name = SINGLE_FILE if single else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        self._files = groups

    @property
    def files(self) -> list[str]:
        """Names of the safetensors files."""
        return [file.name for file in self._files]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(file.num_bytes for file in self._files)

    @property
    def bytes(self) -> int:
        """Bytes of all safetensors files, headers included."""
        return self.weight_bytes + sum(len(file.header()[0]) for file in self._files)

    @contextmanager
    def open(self, folder: Path) -> Iterator[ShardWriter]:
        """Write into `folder`; at the end every row of every tensor must have come, and all is on disk.

        Raises CheckpointError that names a tensor that is missing.
        """
        writer = ShardWriter(folder, self._files)
        try:
            yield writer
        finally:
            writer.close()
        if writer.missing:
            first = sorted(writer.missing)[0]
            raise CheckpointError(f"{len(writer.missing)} tensors were never written, {first} first.")
        if len(self._files) > 1:
            self._write_index(folder)
        fsync_folder(folder)

    def _write_index(self, folder: Path) -> None:
        weight_map = {entry.key: file.name for file in self._files for entry in file.entries}
        parameters = sum(prod(entry.shape) for file in self._files for entry in file.entries)
        metadata = {"total_parameters": parameters, "total_size": self.weight_bytes}
        text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
        (folder / INDEX_FILE).write_text(text, encoding="utf-8")


class ShardWriter:
    """Puts tensors into their places; made by `ShardPlan.open`.

    missing: name -> rows that have not come yet.
    """

    def __init__(self, folder: Path, files: Sequence[_File]) -> None:
        self._folder = folder
        self._where = {entry.key: (file, entry) for file in files for entry in file.entries}
        self._left = {file.name: len(file.entries) for file in files}
        self._open: dict[str, tuple[IO[bytes], dict[str, int]]] = {}
        self.missing = {key: entry.num_rows for key, (_, entry) in self._where.items()}

    def write(self, key: str, first_row: int, rows: Tensor) -> None:
        """Write rows of one tensor, from `first_row` of dim 0 on; on the CPU, each row once.

        Raises CheckpointError for rows of another shape or dtype, too many rows, and a name that is in no plan.
        """
        if self.missing.get(key, 0) < len_rows(rows):
            raise CheckpointError(f"{key} is not expected (again). Correct the keys of its ModelFamily.")
        file, entry = self._where[key]
        if (rows.dtype, tuple(rows.shape[1:])) != (entry.dtype, entry.shape[1:]):
            raise CheckpointError(
                f"{key} has {rows.dtype} {tuple(rows.shape)}; {entry.dtype} {entry.shape} was planned."
            )
        if file.name not in self._open:
            new = open(self._folder / file.name, "xb")
            header, starts = file.header()
            new.write(header)
            self._open[file.name] = (new, starts)
        stream, starts = self._open[file.name]
        stream.seek(starts[key] + first_row * (entry.bytes // max(1, entry.num_rows)))
        stream.write(tensor_bytes(rows))
        self.missing[key] -= len_rows(rows)
        if not self.missing[key]:
            del self.missing[key]
            self._left[file.name] -= 1
            if not self._left[file.name]:
                self._finish(file.name)

    def _finish(self, name: str) -> None:
        stream, _ = self._open.pop(name)
        with stream:
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Close files that were not finished."""
        for stream, _ in self._open.values():
            stream.close()
        self._open.clear()


def len_rows(tensor: Tensor) -> int:
    """Length of dim 0; a scalar is one row."""
    return len(tensor) if tensor.ndim else 1


def tensor_bytes(tensor: Tensor) -> Any:
    """A CPU tensor's own bytes as a buffer, without a copy where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
