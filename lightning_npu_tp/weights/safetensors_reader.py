"""A Hugging Face folder of safetensors files: what tensors it holds and where, checked before a byte is used.

The headers alone say whether a file is whole: its length is that of the header and the data, and the tensors fill
the data without gap or overlap, each as long as its shape and dtype ask. Slices are then read with pread, straight
into the memory that wants them, so that the pages of a file never count as this process's memory. Which tensors a
model wants is not known here.

Source: the safetensors format, https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_npu_tp.checkpoint.regular_files import is_plain_name, open_regular, read_small
from lightning_npu_tp.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
MERGE = "PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(…)"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LENGTH_BYTES = 8
# What the format allows; a larger number is no header length.
_MAX_HEADER = 100_000_000
# torch's own limits; the product of forty thousand sizes takes seconds to work out.
_MAX_DIMS, _MAX_SIZE = 64, 2**63 - 1
_MAX_SHOWN = 300
_OTHER_KINDS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_AGAIN = "Download it again: `lightning-npu-tp download` resumes and verifies."
_ANEW = (
    "Index and files are not of one kind. Download the folder again, or, if it was put together or changed here, write "
    "it anew where it was made: save_pretrained of transformers writes an index that fits."
)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file. start: byte offset in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's values."""
        return _numel(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a folder, by name, and its files in order."""

    folder: Path
    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_folder(folder: Path | str) -> WeightFiles:
    """Read and check the headers of a folder's safetensors files; no tensor is read.

    Raises CheckpointError that names the file and what to do, for a folder that is missing, empty or holds other
    formats only, an index that does not fit its files, and a file that is cut short, damaged or quantised.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"The model folder {folder} {what}. Give the folder that holds {SINGLE_FILE} or its shards."
        )
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if _is_there(index):
        tensors = _read_index(index)
        if _is_there(single) and not any(tensor.file == single for tensor in tensors.values()):
            raise CheckpointError(
                f"{folder} holds two models' weights: {SINGLE_FILE}, which transformers would load, and those of "
                f"{INDEX_FILE}, which other programs would. Remove the one that is not meant."
            )
    elif _is_there(single):
        tensors = read_header(single)
    else:
        raise CheckpointError(_why_nothing(folder))
    return WeightFiles(folder, tensors, tuple(sorted({tensor.file for tensor in tensors.values()})))


def _is_there(path: Path) -> bool:
    """Whether a file exists; a link to nothing is an error of its own."""
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path} is a link to {os.readlink(path)}, which does not exist. {_AGAIN}")
    return path.is_file()


def _why_nothing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    if told := told_of_adapter(folder):
        return told
    if loose := [name for name in names if name.endswith(".safetensors")]:
        return (
            f"{folder} holds {len(loose)} safetensors files ({loose[0]}, …), but neither {INDEX_FILE} nor "
            f"{SINGLE_FILE}, so nothing says what belongs to the model. {_AGAIN}"
        )
    if other := [name for name in names if name.endswith(_OTHER_KINDS)]:
        return (
            f"{folder} holds weights in another format only ({other[0]}), and reading it could run code or needs "
            f"another program. Convert it once where you trust it: "
            f"AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) of transformers writes safetensors."
        )
    return f"{folder} holds no weights: neither {INDEX_FILE} nor {SINGLE_FILE} ({len(names)} other files). {_AGAIN}"


def told_of_adapter(folder: Path) -> str:
    """What to do with a folder that holds a PEFT adapter and no model; empty for another folder."""
    file = folder / ADAPTER_FILE
    if not file.is_file() or (folder / INDEX_FILE).is_file() or (folder / SINGLE_FILE).is_file():
        return ""
    try:
        base = json.loads(file.read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = "its base model"
    return (
        f"{folder} holds an adapter ({ADAPTER_FILE}) and not the model that it belongs to, {base}. Merge the two where "
        f"PEFT is installed: {MERGE} writes a folder that can be used here."
    )


def _read_index(index: Path) -> dict[str, StoredTensor]:
    try:
        where = json.loads(read_small(index, inside=False), object_pairs_hook=_no_duplicates)["weight_map"]
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise TypeError("its weight_map does not give the file of each tensor")
        names = sorted(set(where.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is damaged or no index of safetensors files ({_short(repr(error))}): it needs a weight_map. "
            f"{_AGAIN}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}. Check the file.") from error
    found: dict[str, StoredTensor] = {}
    for name in names:
        file = index.parent / name
        if not is_plain_name(name):
            raise CheckpointError(f"{index} names {_short(repr(name))}, which lies outside of the folder. {_AGAIN}")
        if not _is_there(file):
            raise CheckpointError(f"{index} names the file {name}, which is missing. {_AGAIN}")
        for key, tensor in read_header(file).items():
            if key in found:
                raise CheckpointError(
                    f"Two files of {index.parent} hold {key}: {found[key].file.name} and {name}. {_ANEW}"
                )
            found[key] = tensor
    for key, name in where.items():
        if key not in found or found[key].file.name != name:
            raise CheckpointError(f"{index} says that {key} is in {name}, but it is not. {_ANEW}")
    if extra := sorted(found.keys() - where.keys()):
        more = f" and {len(extra) - 1} more tensors" if len(extra) > 1 else ""
        raise CheckpointError(
            f"{found[extra[0]].file} holds {extra[0]}{more}, which {index.name} does not name, so that some programs "
            f"would load it and others not. {_ANEW}"
        )
    return found


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises CheckpointError, naming the file, unless it is whole."""
    try:
        with open_regular(file, inside=False) as stream:
            size = os.fstat(stream.fileno()).st_size
            first = stream.read(_LENGTH_BYTES)
            length = int.from_bytes(first, "little")
            if first == b"version ":
                raise _damaged(
                    file, "it is a Git LFS pointer and not the file itself. Run `git lfs pull` in its folder"
                )
            if len(first) < _LENGTH_BYTES or length > min(_MAX_HEADER, size - _LENGTH_BYTES):
                raise _damaged(file, f"it has {size} bytes and its header should have {length}")
            header = json.loads(stream.read(length), object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("it is no table of tensors")
        header.pop("__metadata__", None)
        entries = [_entry(name, value) for name, value in header.items()]
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error.strerror}. Check the file and its permissions."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, f"its header cannot be understood ({_short(str(error))})") from error
    return _checked(file, entries, _LENGTH_BYTES + length, size)


def _entry(name: str, value: dict[str, Any]) -> tuple[str, str, list[int], int, int]:
    """One tensor of a header; ValueError and the like for what is none."""
    dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS:
        raise ValueError(f"{_short(name)} is given a shape of more than {_MAX_DIMS} sizes, or none")
    numbers = [*shape, start, stop]
    if not isinstance(dtype, str) or not all(type(n) is int and 0 <= n <= _MAX_SIZE for n in numbers):
        raise ValueError(
            f"{_short(name)} is given dtype {_short(str(dtype))} and shape {_short(str(shape))} at {start} to {stop}"
        )
    return name, dtype, shape, start, stop


def _checked(
    file: Path, entries: list[tuple[str, str, list[int], int, int]], data: int, size: int
) -> dict[str, StoredTensor]:
    """The header's entries as tensors, if they fill the file's data without gap or overlap."""
    tensors: dict[str, StoredTensor] = {}
    position = 0
    for name, dtype, shape, start, stop in sorted(entries, key=lambda entry: (entry[3], entry[4])):
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{_short(name)} in {file} has the dtype {_short(dtype)}, which cannot be trained: the model is "
                f"quantised, or of a kind that this package does not know. Take its unquantised weights, or convert it "
                f"to bfloat16 first."
            )
        tensor = StoredTensor(file, _DTYPES[dtype], tuple(shape), data + start)
        if start != position or stop - start != tensor.nbytes:
            raise _damaged(
                file,
                f"its header places {_short(name)} ({dtype} {_short(str(shape))}, {_short(str(tensor.nbytes))} bytes) "
                f"at {start} to {stop}, where {position} to {_short(str(position + tensor.nbytes))} is due",
            )
        tensors[name] = tensor
        position = stop
    if data + position != size:
        state = "was cut short" if size < data + position else "has more behind its end"
        raise _damaged(file, f"it has {size} bytes instead of {data + position}; it {state}")
    return tensors


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged: {why}. {_AGAIN}")


def _short(text: str) -> str:
    """Text of a stranger's file as an error can show it."""
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


class SliceReader:
    """Reads slices of stored tensors into tensors; keeps one file open, and one buffer of `buffer_bytes`.

    bytes: read so far.
    """

    def __init__(self, buffer_bytes: int = 1 << 24) -> None:
        self.bytes = 0
        self._buffer_bytes = buffer_bytes
        self._buffer: Tensor | None = None
        self._file: Path | None = None
        self._descriptor = -1

    def close(self) -> None:
        """Close the file that is open, if one is."""
        if self._file is not None:
            os.close(self._descriptor)
            self._file = None

    @torch.no_grad()
    def read(self, stored: StoredTensor, bounds: tuple[tuple[int, int], ...], out: Tensor) -> None:
        """Fill `out` with the slice `bounds` of a stored tensor, in out's dtype and on its device.

        out: of the slice's shape; may be a view of a larger tensor. Raises CheckpointError if the file ends early.
        """
        self._open(stored.file)
        if not out.numel():
            return
        if out.device.type == "cpu" and out.dtype == stored.dtype and out.is_contiguous():
            self._fill(stored, bounds, out)
            return
        # Through the buffer, some rows at a time.
        rows = bounds[0] if bounds else (0, 1)
        per_row = out.numel() // (rows[1] - rows[0]) * stored.dtype.itemsize
        step = max(1, self._buffer_bytes // max(per_row, 1))
        for start in range(rows[0], rows[1], step):
            stop = min(start + step, rows[1])
            part = out[start - rows[0] : stop - rows[0]] if bounds else out
            staged = self._staging(part.numel() * stored.dtype.itemsize).view(stored.dtype).view(part.shape)
            self._fill(stored, ((start, stop), *bounds[1:]) if bounds else (), staged)
            part.copy_(staged)

    def _staging(self, nbytes: int) -> Tensor:
        if self._buffer is None or self._buffer.numel() < nbytes:
            self._buffer = torch.empty(max(nbytes, min(self._buffer_bytes, nbytes * 2)), dtype=torch.uint8)
        return self._buffer[:nbytes]

    def _open(self, file: Path) -> None:
        if self._file == file:
            return
        self.close()
        self._descriptor, self._file = os.open(file, os.O_RDONLY), file

    def _fill(self, stored: StoredTensor, bounds: tuple[tuple[int, int], ...], out: Tensor) -> None:
        """Read into contiguous host memory of the stored dtype, run by run of what lies together in the file."""
        memory = memoryview(out.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        position = 0
        for start, count in runs(stored.shape, bounds):
            nbytes = count * stored.dtype.itemsize
            self._pread(memory[position : position + nbytes], stored.start + start * stored.dtype.itemsize)
            position += nbytes

    def _pread(self, memory: memoryview, offset: int) -> None:
        while len(memory):
            count = os.preadv(self._descriptor, [memory], offset)
            if count == 0:
                assert self._file is not None
                raise _damaged(self._file, f"it ended at byte {offset} while it was read")
            self.bytes += count
            memory, offset = memory[count:], offset + count


def runs(shape: tuple[int, ...], bounds: tuple[tuple[int, int], ...]) -> Iterator[tuple[int, int]]:
    """(first element, number of elements) of each contiguous part of a slice of a row-major tensor, in order."""
    split = len(shape)
    # Dimensions behind the last one that is cut are read in one go.
    while split > 0 and bounds[split - 1] == (0, shape[split - 1]):
        split -= 1
    inner = _numel(shape[split:])
    if split == 0:
        yield 0, inner
        return
    start, stop = bounds[split - 1]
    row = shape[split - 1] * inner
    for outer in _outer_indices(shape[: split - 1], bounds[: split - 1]):
        yield outer * row + start * inner, (stop - start) * inner


def _outer_indices(shape: tuple[int, ...], bounds: tuple[tuple[int, int], ...]) -> Iterator[int]:
    if not shape:
        yield 0
        return
    for outer in _outer_indices(shape[:-1], bounds[:-1]):
        for index in range(*bounds[-1]):
            yield outer * shape[-1] + index


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
