"""Where an export takes tensors from: a checkpoint's files, read slice by slice, without a device or process group.

A source knows names, global shapes and dtypes, and reads any part of any tensor onto the CPU, so that who asks decides
how much is in memory. Shards of a folder are read in place: a slice of a stored shard costs its own bytes and not the
shard's. The weights of a live run are a source too (live_source.py). Nothing is unpickled but plain data.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from io import IOBase
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from lightning_npu_tp.checkpoint.manifest import packing_problem
from lightning_npu_tp.checkpoint.reader import not_plain, read_index, read_object
from lightning_npu_tp.checkpoint.regular_files import open_regular
from lightning_npu_tp.errors import CheckpointError
from lightning_npu_tp.models.file_names import Bounds, Piece

# As Lightning and training_state.py name the weights.
_MODEL_KEY = "model."
T = TypeVar("T")


class TensorSource(Protocol):
    """What an export reads from.

    shapes, dtypes: by name; names are those of the LightningModule's state dict.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Global shape by name."""
        ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Dtype by name."""
        ...

    def read(self, name: str, bounds: Bounds) -> Tensor:
        """The part of a tensor within `bounds` (first, one past the last, per dimension); on the CPU."""
        ...


def assembled(
    name: str,
    bounds: Bounds,
    dtype: torch.dtype,
    parts: Iterable[tuple[Bounds, T]],
    read: Callable[[T, Bounds], Tensor],
    *,
    whose: str,
) -> Tensor:
    """The part of a tensor within `bounds`, put together from parts that lie in different places; on the CPU.

    parts: bounds of each part in the tensor, and what `read` needs to know of it.
    read:  (that, bounds inside of the part) -> values; is called for the parts that are needed, in order.
    whose: what the parts are, for the message.
    Raises CheckpointError where the parts do not cover it.
    """
    found = torch.empty([stop - start for start, stop in bounds], dtype=dtype)
    covered = 0
    for own, where in parts:
        if (overlap := Piece(name, (), own).overlap(bounds)) is None:
            continue
        inside, target = overlap
        part = read(where, inside)
        found[_slices(target)] = part
        covered += part.numel()
    if covered != found.numel():
        raise CheckpointError(f"{whose} cover {covered} of {found.numel()} values of {name}.")
    return found


class FileSource:
    """A checkpoint file of plain Lightning; its tensors are mapped and not loaded."""

    def __init__(self, path: Path) -> None:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception:
            # Says in words why a file cannot be read; an old-style file, which cannot be mapped, it reads.
            checkpoint = read_object(path, True)
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise CheckpointError(f"{path} is no training checkpoint: it has no 'state_dict'.")
        self._tensors = {name: t for name, t in checkpoint["state_dict"].items() if isinstance(t, Tensor)}
        self.rest: dict[str, Any] = checkpoint
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}

    def read(self, name: str, bounds: Bounds) -> Tensor:
        """The part of a tensor within `bounds`; see `TensorSource.read`."""
        return self._tensors[name][_slices(bounds)]


class FolderSource:
    """A sharded checkpoint folder of any layout."""

    def __init__(self, path: Path) -> None:
        self._path = path
        metadata = read_index(path)
        self._stored = metadata.storage_data
        self._tensors = {
            name.removeprefix(_MODEL_KEY): (name, entry)
            for name, entry in metadata.state_dict_metadata.items()
            if name.startswith(_MODEL_KEY) and isinstance(entry, TensorStorageMetadata)
        }
        self.shapes = {name: tuple(entry.size) for name, (_, entry) in self._tensors.items()}
        self.dtypes = {name: entry.properties.dtype for name, (_, entry) in self._tensors.items()}

    def read(self, name: str, bounds: Bounds) -> Tensor:
        """The part of a tensor within `bounds`. Raises CheckpointError where stored shards do not cover it."""
        full_name, entry = self._tensors[name]
        chunks = (
            (tuple((first, first + size) for first, size in zip(chunk.offsets, chunk.sizes, strict=True)), chunk)
            for chunk in entry.chunks
        )
        read = partial(self._stored_part, full_name)
        return assembled(name, bounds, self.dtypes[name], chunks, read, whose=f"The shards of {self._path}")

    def _stored_part(self, full_name: str, chunk: ChunkStorageMetadata, inside: Bounds) -> Tensor:
        """A part of one stored shard, read from its bytes in the file."""
        index, shape = MetadataIndex(full_name, chunk.offsets), tuple(chunk.sizes)
        info = self._stored[index]
        file = self._path / info.relative_path
        try:
            with open_regular(file) as stream:
                view: Any = _create_file_view(cast(IOBase, stream), info.offset, info.length)
                # On meta: strides and the place of the bytes, without the bytes.
                if problem := packing_problem(stream, info.offset, info.length):
                    raise CheckpointError(f"{file} {problem}.")
                shard = torch.load(view, map_location="meta", weights_only=True)
                if not isinstance(shard, Tensor):
                    raise CheckpointError(f"{file} holds {type(shard).__name__} where {index.fqn} should be.")
                start = info.offset + shard.untyped_storage()._checkpoint_offset
                if tuple(shard.shape) != shape:
                    raise CheckpointError(f"{file} holds {index.fqn} of shape {tuple(shard.shape)} instead of {shape}.")
                if not shard.is_contiguous() or not shape:
                    view.seek(0)
                    whole = torch.load(view, map_location="cpu", weights_only=True)
                    return whole[_slices(inside)]
                return _read_rows(stream.fileno(), start + shard.storage_offset() * shard.itemsize, shard, inside)
        except CheckpointError:
            raise
        except pickle.UnpicklingError as error:
            raise CheckpointError(not_plain(file, error)) from error
        except Exception as error:
            # Damaged pickles raise all kinds of errors.
            raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {error}") from error


def _read_rows(descriptor: int, start: int, shard: Tensor, inside: Bounds) -> Tensor:
    """The part `inside` of a contiguous tensor whose bytes begin at `start`; reads whole rows of dim 0."""
    first, last = inside[0]
    row_shape = tuple(shard.shape[1:])
    row_bytes = prod(row_shape) * shard.itemsize
    buffer = bytearray((last - first) * row_bytes)
    view, position = memoryview(buffer), start + first * row_bytes
    while view:
        read = os.preadv(descriptor, [view], position)
        if read == 0:
            raise OSError(f"the file ends {len(view)} bytes too early")
        view, position = view[read:], position + read
    if not buffer:
        return torch.empty((last - first, *row_shape), dtype=shard.dtype)[(slice(None), *_slices(inside[1:]))]
    rows = torch.frombuffer(buffer, dtype=shard.dtype).reshape(last - first, *row_shape)
    return rows[(slice(None), *_slices(inside[1:]))]


def _slices(bounds: Bounds) -> tuple[slice, ...]:
    return tuple(slice(*pair) for pair in bounds)
