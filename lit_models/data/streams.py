"""Documents end to end: the arrays that sequences are cut from, and how they grow, in memory or in files.

A builder holds no more than a buffer of what goes into files, so a corpus of any size passes through. The tokens are
of the smallest type that holds the vocabulary. Which documents go in, and what is cut from the stream, is
decided elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

_BUFFER = 2**22  # bytes gathered before they are written or joined


@dataclass(frozen=True)
class TokenStream:
    """Documents end to end.

    tokens: [N] integers, eos after every document.
    starts: [documents] int64, ascending; index of each document's first token; starts[0] is 0.
    learn:  [N] uint8, 1 for a token that is to be predicted; None where all are.
    """

    tokens: np.ndarray
    starts: np.ndarray
    learn: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens N, the eos of every document included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Number of documents; each has at least one token and its eos."""
        return len(self.starts)


class _Growing:
    """An array that is appended to; in memory, or in a file with one buffer of it in memory."""

    def __init__(self, dtype: DTypeLike, path: Path | None) -> None:
        self.dtype = np.dtype(dtype)
        self._path = path
        self._file = None if path is None else path.open("w+b")
        self._joined: list[np.ndarray] = []
        self._buffer: list[np.ndarray] = []
        self._buffered = 0

    def append(self, values: ArrayLike) -> None:
        """Append a copy of one value or of several."""
        array = np.array(values, dtype=self.dtype, ndmin=1)
        self._buffer.append(array)
        self._buffered += array.nbytes + 64
        if self._buffered >= _BUFFER:
            self._flush()

    def _flush(self) -> None:
        if self._buffer:
            joined = np.concatenate(self._buffer)
            self._buffer, self._buffered = [], 0
            if self._file is None:
                self._joined.append(joined)
            else:
                self._file.write(joined.data)

    def read(self) -> np.ndarray:
        """All values so far; in memory a copy, in a file its mapping."""
        self._flush()
        if self._file is None:
            return np.concatenate(self._joined) if self._joined else np.empty(0, dtype=self.dtype)
        self._file.flush()
        return map_file(self._path, self.dtype)  # type: ignore[arg-type]

    def remove(self, begin: int, end: int) -> None:
        """Take values [begin:end] out again; what follows moves up."""
        values = self.read()
        if self._file is None:
            self._joined = [np.delete(values, slice(begin, end))]
            return
        for at in range(end, len(values), _BUFFER):
            moved = np.array(values[at : at + _BUFFER])
            self._file.seek((at - (end - begin)) * self.dtype.itemsize)
            self._file.write(moved.data)
            self._file.flush()
        kept = (len(values) - (end - begin)) * self.dtype.itemsize
        del values
        self._file.seek(kept)
        self._file.truncate()

    def close(self) -> None:
        self._flush()
        if self._file is not None:
            self._file.close()


def map_file(path: Path, dtype: DTypeLike) -> np.ndarray:
    """A file's values, read when they are used; a plain array, since slicing is faster than a memmap's."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


class StreamBuilder:
    """Gathers encoded documents into a `TokenStream`, up to a number of tokens or documents.

    The document that reaches `max_tokens` is cut so that it, closed with eos, ends exactly there.

    eos_id: closes each document; None where documents close themselves.
    bos_id: begins each document; None for none.
    learn:  keep for each token whether it is to be predicted.
    path:   files `path.tokens`, `path.starts` and `path.learn` instead of memory.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        eos_id: int | None,
        bos_id: int | None = None,
        max_tokens: int | None = None,
        max_documents: int | None = None,
        learn: bool = False,
        path: Path | None = None,
    ):
        self.num_tokens = 0
        self.num_documents = 0
        self.names: list[str] = []  # empty with `path`: there may be more names than memory
        self._in_memory = path is None
        self._columns = {
            name: _Growing(dtype, None if path is None else path.with_name(f"{path.name}.{name}"))
            for name, dtype in column_types(vocab_size, learn=learn).items()
        }
        self._eos_id = eos_id
        self._bos_id = bos_id
        self._max_tokens = max_tokens
        self._max_documents = max_documents
        self._open = 0  # tokens of a document of which only parts came yet

    @property
    def full(self) -> bool:
        """Whether a limit is reached; one token short counts, for no document fits into one token."""
        tokens_full = self._max_tokens is not None and self.num_tokens >= self._max_tokens - 1
        return tokens_full or (self._max_documents is not None and self.num_documents >= self._max_documents)

    def add(self, name: str, ids: ArrayLike, *, learn: ArrayLike | None = None, ends: bool = True) -> bool:
        """Append a document's ids [tokens], without eos and bos; False, and no change, if it is empty or this is full.

        learn: [tokens] of 0 and 1, where this keeps them.
        ends:  false for a part of a document that others follow; eos comes after the last.
        """
        ids = np.asarray(ids)
        if self.full or (ends and len(ids) == 0 and not self._open):
            return False
        if self._bos_id is not None and len(ids) and not self._open:
            ids = np.concatenate([[self._bos_id], ids])
        room = len(ids) if self._max_tokens is None else self._max_tokens - self.num_tokens - 1
        closes = ends or (self._max_tokens is not None and len(ids) >= room)
        ids = ids[:room]
        self._append("tokens", ids)
        if learn is not None:
            self._append("learn", np.asarray(learn)[:room])
        self._open += len(ids)
        self.num_tokens += len(ids)
        if closes:
            self._append("starts", self.num_tokens - self._open)
            if self._eos_id is not None:
                self._append("tokens", self._eos_id)
                self.num_tokens += 1
            self._open = 0
            self.num_documents += 1
            if self._in_memory:
                self.names.append(name)
        return True

    def _append(self, column: str, values: ArrayLike) -> None:
        self._columns[column].append(values)

    def pop(self, index: int) -> tuple[str, np.ndarray]:
        """Take a document out again: its name ("" with `path`) and its ids without eos and bos."""
        name, ids, _ = self.pop_learnt(index)
        return name, ids

    def pop_learnt(self, index: int) -> tuple[str, np.ndarray, np.ndarray | None]:
        """Take document `index` out again: its name, its ids without eos and bos, and which are to be predicted."""
        starts = np.array(self._columns["starts"].read())
        begin = int(starts[index])
        end = int(starts[index + 1]) if index + 1 < len(starts) else self.num_tokens
        taken = {}
        for name in self._columns.keys() - {"starts"}:
            taken[name] = np.array(self._columns[name].read()[begin:end])
            self._columns[name].remove(begin, end)
        self._columns["starts"].remove(index, len(starts))
        self._append("starts", starts[index + 1 :] - (end - begin))
        self.num_tokens -= end - begin
        self.num_documents -= 1
        ids = taken["tokens"][self._bos_id is not None : None if self._eos_id is None else -1]
        return self.names.pop(index) if self._in_memory else "", ids, taken.get("learn")

    def give_part(self, begin: int, end: int, other: StreamBuilder, name: str) -> None:
        """Move ids [begin:end] of the only document to `other`, as a document there; a buffer at a time.

        Its bos stays, and `other` gives the part one of its own.
        """
        begin = max(begin, int(self._bos_id is not None))
        ids = self._columns["tokens"].read()
        for at in range(begin, end, _BUFFER):
            other.add(name, ids[at : min(at + _BUFFER, end)], ends=at + _BUFFER >= end)
        del ids
        self._columns["tokens"].remove(begin, end)
        self.num_tokens -= end - begin

    def build(self) -> TokenStream:
        """The stream of all documents in the order of their `add`; nothing can be added behind it."""
        stream = TokenStream(**{name: column.read() for name, column in self._columns.items()})
        self.close()
        return stream

    def close(self) -> None:
        """Close the files; also where something failed."""
        for column in self._columns.values():
            column.close()


def column_types(vocab_size: int, *, learn: bool) -> dict[str, np.dtype]:
    """The arrays of a stream and their types."""
    tokens = np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)
    types = {"tokens": tokens, "starts": np.dtype(np.int64)}
    return {**types, "learn": np.dtype(np.uint8)} if learn else types


def open_stream(path: Path, *, vocab_size: int, learn: bool) -> TokenStream:
    """The stream that a builder with this `path` has written, mapped and not read."""
    types = column_types(vocab_size, learn=learn)
    return TokenStream(**{name: map_file(path.with_name(f"{path.name}.{name}"), kind) for name, kind in types.items()})
