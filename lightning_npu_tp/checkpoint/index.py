"""The index of a checkpoint's tensors, torch's `.metadata`, read as data: a pickle that makes plain records only.

torch unpickles it freely, and an unpickler that only allows the classes of an index still lets BUILD set attributes of
those classes, a memo number of nine bytes ask for gigabytes, and nested tuples be hashed for hours. Here the few
instructions that an index is made of fill records, which are then held against what an index has to be: every tensor
covered once by its shards, every shard in a regular file of the folder that is long enough. So no size in it is larger
than what is on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from pickletools import genops
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lightning_npu_tp.checkpoint.manifest import DCP_FILE, MAX_INDEX_BYTES, WHAT_TO_DO
from lightning_npu_tp.checkpoint.regular_files import is_plain_name, read_small, regular_size
from lightning_npu_tp.errors import CheckpointError

_METADATA = "torch.distributed.checkpoint.metadata"
_STORAGE = "torch.distributed.checkpoint.filesystem._StorageInfo"
_NAMES = {
    *(
        f"{_METADATA}.{name}"
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    _STORAGE,
    "torch.Size",
    "torch.serialization._get_layout",
    "collections.OrderedDict",
    # Folders written before manifests store where they were.
    *(f"pathlib.{pure}{kind}Path" for pure in ("", "Pure") for kind in ("Posix", "Windows")),
    *(f"pathlib._local.{kind}Path" for kind in ("Posix", "Windows")),
}
# At least, for a record with its offsets and sizes.
_BYTES_PER_SHARD = 16
# torch's own limit.
_MAX_DIMS = 64
_MAX_NUMBER = 2**63 - 1
# Shards that form no grid are compared pair by pair.
_MAX_PAIRED = 1024


class _Malformed(ValueError):
    """What is wrong with an index, as the end of a sentence that begins with its file."""


@dataclass(frozen=True)
class _Name:
    """A class or function that the pickle names; nothing is looked up."""

    path: str


@dataclass(eq=False)
class _Record:
    """What the pickle makes of a name: called with `args`, then given a state. Hashed by identity, in no time."""

    path: str
    args: Any
    state: Any = None


def read_index(path: Path) -> Metadata:
    """The index of a folder's tensors, checked against the folder's files.

    Raises CheckpointError, naming the file, for anything that no index holds, and for tensors that its shards do not
    cover once; in time and memory that grow with the index alone.
    """
    file = path / DCP_FILE
    try:
        content = read_small(file, MAX_INDEX_BYTES)
        metadata = _metadata(_records(content), len(content))
        _require_whole(path, metadata)
    except CheckpointError:
        raise
    except _Malformed as error:
        raise CheckpointError(f"{file} {error}. {WHAT_TO_DO}") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}. {WHAT_TO_DO}") from error
    except Exception as error:
        # Damaged pickles raise all kinds of errors.
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {error}. {WHAT_TO_DO}") from error
    return metadata


# --- the pickle ---------------------------------------------------------------------------------

_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_ARGUMENTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_GETS = {"BINGET", "LONG_BINGET"}
_PUTS = {"BINPUT", "LONG_BINPUT"}
_MAKES = {"REDUCE", "NEWOBJ"}
_IGNORED = {"PROTO", "FRAME"}


def _records(content: bytes) -> Any:
    """What the pickle says, in records, dicts, lists, tuples, texts and integers."""
    stack: list[Any] = []
    below: list[list[Any]] = []
    memo: dict[int, Any] = {}
    instructions: Iterator[tuple[Any, Any, Any]] = genops(content)
    for opcode, argument, _ in instructions:
        name = opcode.name
        if name in _ARGUMENTS:
            stack.append(argument)
        elif name in _GETS:
            stack.append(memo[argument])
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _PUTS:
            memo[argument] = stack[-1]
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, below.pop()
            if name == "TUPLE":
                stack.append(tuple(items))
            elif name == "APPENDS":
                _of(list, stack[-1]).extend(items)
            else:
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _put(stack[-1], key, value)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _put(stack[-1], key, value)
        elif name == "APPEND":
            item = stack.pop()
            _of(list, stack[-1]).append(item)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "GLOBAL":
            stack.append(_named(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_named(f"{module}.{attribute}"))
        elif name in _MAKES:
            arguments = stack.pop()
            stack.append(_Record(_of(_Name, stack.pop()).path, _of(tuple, arguments)))
        elif name == "BUILD":
            state, target = stack.pop(), stack[-1]
            if isinstance(target, _Name):
                raise _Malformed(f"sets attributes of {target.path}, which no index does")
            _of(_Record, target).state = state
        elif name == "STOP":
            return stack.pop()
        elif name not in _IGNORED:
            raise _Malformed(f"holds the pickle instruction {name}, which no index of tensors is made of")
    raise _Malformed("has no end")


def _put(target: Any, key: Any, value: Any) -> None:
    if not isinstance(key, str | _Record):
        # The hash of other keys may take for ever.
        raise _Malformed(f"has an entry under a {type(key).__name__}")
    _of(dict, target)[key] = value


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise _Malformed(f"has a {type(value).__name__} where a {kind.__name__.lstrip('_').lower()} is due")
    return value


def _named(path: str) -> _Name:
    if path in _NAMES or (path.startswith("torch.") and isinstance(_dtype(path), torch.dtype)):
        return _Name(path)
    raise _Malformed(
        f"names {path[:200]}, which no index of tensors holds; loading it could run code. Do not use this checkpoint "
        f"unless you know who wrote it"
    )


def _dtype(path: str) -> Any:
    return getattr(torch, path.removeprefix("torch."), None)


# --- records as torch's index --------------------------------------------------------------------


def _metadata(value: Any, num_bytes: int) -> Metadata:
    """The index in torch's classes, of what the pickle of `num_bytes` says."""
    if not (isinstance(value, _Record) and value.path == f"{_METADATA}.Metadata"):
        what = value.path if isinstance(value, _Record | _Name) else type(value).__name__
        raise _Malformed(f"holds {what} instead of an index")
    fields = _state(value, "Metadata")
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    # One list may stand in for the shards of many tensors: what is made of it must not outgrow the file.
    left = num_bytes // _BYTES_PER_SHARD
    for name, value in _of(dict, fields.get("state_dict_metadata")).items():
        entry = tensors[_text(name)] = _entry(name, value, left)
        left -= len(entry.chunks) if isinstance(entry, TensorStorageMetadata) else 0
    storage = {_place(key): _info(info) for key, info in _of(dict, fields.get("storage_data")).items()}
    paths = fields.get("planner_data")
    planner = None if paths is None else {_text(k): _object_path(v) for k, v in _of(dict, paths).items()}
    return Metadata(tensors, planner_data=planner, storage_data=storage)


def _state(value: Any, name: str) -> dict[Any, Any]:
    path = _STORAGE if name == "_StorageInfo" else f"{_METADATA}.{name}"
    if not isinstance(value, _Record) or value.path != path:
        raise _Malformed(f"has no {name} where one is due")
    return {} if value.state is None else _of(dict, value.state)


def _text(value: Any) -> str:
    return _of(str, value)


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_NUMBER:
        # Of other kinds not the text, which may be endless.
        what = f"the number {value:.3g}" if type(value) is int and abs(value) < 2**80 else type(value).__name__
        raise _Malformed(f"has {what} where a size is due")
    return value


def _shape(value: Any) -> torch.Size:
    if isinstance(value, _Record) and value.path == "torch.Size":
        value = value.args[0] if value.args else ()
    if not isinstance(value, tuple | list) or len(value) > _MAX_DIMS:
        raise _Malformed("has something else where the sizes of a tensor are due")
    sizes = torch.Size([_number(size) for size in value])
    if prod(size for size in sizes if size) > _MAX_NUMBER:
        raise _Malformed(f"has a tensor of sizes {tuple(sizes)}")
    return sizes


def _object_path(value: Any) -> tuple[str | int, ...]:
    if not isinstance(value, tuple | list) or len(value) > _MAX_DIMS or any(type(p) not in (str, int) for p in value):
        raise _Malformed("has something else where the place of an entry is due")
    return tuple(value)


def _entry(name: str, value: Any, max_chunks: int) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(value, _Record) and value.path == f"{_METADATA}.BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _state(value, "TensorStorageMetadata")
    properties = fields.get("properties")
    state = properties.state if isinstance(properties, _Record) else None
    if not isinstance(state, tuple) or not state or not isinstance(state[0], _Name):
        raise _Malformed(f"does not say the dtype of {name}")
    dtype = _dtype(state[0].path)
    if not isinstance(dtype, torch.dtype):
        raise _Malformed(f"does not say the dtype of {name}")
    stored = _of(list, fields.get("chunks"))
    if len(stored) > max_chunks:
        raise _Malformed("has more shards than its bytes can name")
    chunks = [_chunk(chunk) for chunk in stored]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), _shape(fields.get("size")), chunks)


def _chunk(value: Any) -> ChunkStorageMetadata:
    fields = _state(value, "ChunkStorageMetadata")
    return ChunkStorageMetadata(_shape(fields.get("offsets")), _shape(fields.get("sizes")))


def _place(value: Any) -> MetadataIndex:
    fields = _state(value, "MetadataIndex")
    offset, index = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _text(fields.get("fqn")),
        None if offset is None else _shape(offset),
        None if index is None else _number(index),
    )


def _info(value: Any) -> _StorageInfo:
    fields = _state(value, "_StorageInfo")
    if fields.get("transform_descriptors"):
        raise _Malformed("has shards that are compressed or otherwise changed")
    name = _text(fields.get("relative_path"))
    if not is_plain_name(name):
        raise _Malformed(f"points outside of the checkpoint: {name[:200]}")
    return _StorageInfo(name, _number(fields.get("offset")), _number(fields.get("length")))


# --- the index and the folder ---------------------------------------------------------------------


def _require_whole(path: Path, metadata: Metadata) -> None:
    """Every tensor covered once, every shard and other entry within a file of the folder."""
    sizes: dict[str, int] = {}
    for info in metadata.storage_data.values():
        if info.relative_path not in sizes:
            sizes[info.relative_path] = _size(path / info.relative_path)
        if info.offset + info.length > sizes[info.relative_path]:
            raise _Malformed(f"says more of {info.relative_path} than its {sizes[info.relative_path]:,} bytes")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            _stored(metadata, MetadataIndex(name))
            continue
        if why := _not_covered(entry.size, entry.chunks):
            raise _Malformed(f"has {name} of sizes {tuple(entry.size)}, {why}")
        for chunk in entry.chunks:
            needed = prod(chunk.sizes) * entry.properties.dtype.itemsize
            if _stored(metadata, MetadataIndex(name, chunk.offsets)).length < needed:
                raise _Malformed(f"has a shard of {name} at {tuple(chunk.offsets)} in fewer bytes than it has")


def _size(file: Path) -> int:
    try:
        return regular_size(file)
    except OSError as error:
        raise _Malformed(f"names {file.name}, which cannot be read: {error.strerror}") from None


def _stored(metadata: Metadata, place: MetadataIndex) -> _StorageInfo:
    found = metadata.storage_data.get(place)
    if found is None:
        raise _Malformed(f"does not say where {place.fqn} is stored")
    return found


def _not_covered(size: Sequence[int], chunks: Sequence[ChunkStorageMetadata]) -> str:
    """Why shards do not cover a tensor of `size` exactly once, or an empty text."""
    if not chunks:
        return "without a shard"
    for chunk in chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == len(size) or any(
            first + count > whole for first, count, whole in zip(chunk.offsets, chunk.sizes, size, strict=True)
        ):
            return f"and a shard {tuple(chunk.sizes)} at {tuple(chunk.offsets)}, which lies outside of it"
    filled = [chunk for chunk in chunks if prod(chunk.sizes)]
    covered = sum(prod(chunk.sizes) for chunk in filled)
    if covered != prod(size):
        return f"and shards of {covered:,} values together, not {prod(size):,}"
    if len(filled) > 1 and not _is_grid(size, filled) and _overlap(filled):
        return "and shards that lie over each other, so that other values have none"
    return ""


def _is_grid(size: Sequence[int], chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Whether shards are the cells between cuts through the whole tensor, each once; in linear time."""
    ends = []
    for dim, whole in enumerate(size):
        cuts = sorted({chunk.offsets[dim] for chunk in chunks} | {whole})
        ends.append(dict(pairwise(cuts)))
    return len({tuple(chunk.offsets) for chunk in chunks}) == len(chunks) == prod(map(len, ends)) and all(
        ends[dim].get(first) == first + count
        for chunk in chunks
        for dim, (first, count) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True))
    )


def _overlap(chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Whether any two shards have a value in common."""
    if len(chunks) > _MAX_PAIRED:
        raise _Malformed(f"has a tensor in {len(chunks):,} shards that form no grid, which cannot be checked")
    first = np.array([chunk.offsets for chunk in chunks], dtype=np.int64)
    last = first + np.array([chunk.sizes for chunk in chunks], dtype=np.int64)
    meets: Callable[[int], Any] = lambda one: ((first[one] < last[:one]) & (first[:one] < last[one])).all(axis=1).any()  # noqa: E731
    return any(bool(meets(one)) for one in range(1, len(chunks)))
