"""Documents to training sequences of one fixed length, no token lost and none predicted twice.

Documents are laid end to end, each closed with eos, into one stream of N tokens. Sequence k covers the
stream from k*(S-1) to k*(S-1)+S: neighbours share one token, which is the last target of the one and
only context in the other, so that the prediction across the border is made, once.

Labels are NOT shifted here. `labels` lies aligned with `input_ids`, -100 where nothing is to be predicted, and
the model shifts once (transformers' convention: logits at t against labels at t+1). labels[0] of every sequence
is -100 since no logit could be held against it, so counting `labels != -100` counts predictions.

    documents [a b] [c d e], S = 4; "." is eos and "_" is -100

                 stream   a b . c d e .
    plain        inputs   a b . c    c d e .           every token but the stream's first is predicted
                 labels   _ b . c    _ d e .
    isolated     labels   _ b . _    _ d e .           and no document's first token is
                 position 0 1 2 0    0 1 2 3           restarts: no attention across documents

The tokens live in one array of the smallest type that holds the vocabulary; sequences are cut when
they are asked for. Which documents, in what order and on which rank is not decided here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.utils.data import Dataset

from lightning_npu_tp.errors import DataError

IGNORED = -100  # torch's and transformers' ignore_index


@dataclass(frozen=True)
class TokenStream:
    """Documents end to end.

    tokens: [N] integers, eos after every document.
    starts: [documents] int64, ascending; index of each document's first token; starts[0] is 0.
    """

    tokens: np.ndarray
    starts: np.ndarray

    @property
    def num_tokens(self) -> int:
        """N, the eos of every document included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Number of documents; each has at least one token and its eos."""
        return len(self.starts)


class StreamBuilder:
    """Gathers encoded documents into a `TokenStream`, up to a number of tokens or documents.

    The document that reaches `max_tokens` is cut so that it, closed with eos, ends exactly there.
    """

    def __init__(
        self, *, vocab_size: int, eos_id: int, max_tokens: int | None = None, max_documents: int | None = None
    ):
        self.num_tokens = 0
        self.names: list[str] = []
        self._documents: list[np.ndarray] = []
        self._dtype = np.uint16 if vocab_size <= 2**16 else np.int32
        self._eos_id = eos_id
        self._max_tokens = max_tokens
        self._max_documents = max_documents

    @property
    def num_documents(self) -> int:
        """Documents gathered so far."""
        return len(self._documents)

    @property
    def full(self) -> bool:
        """Whether a limit is reached; one token short counts, for no document fits into one token."""
        tokens_full = self._max_tokens is not None and self.num_tokens >= self._max_tokens - 1
        return tokens_full or (self._max_documents is not None and self.num_documents >= self._max_documents)

    def add(self, name: str, ids: ArrayLike) -> bool:
        """Append one document's ids [tokens], without eos; False, and no change, if it is empty or this is full."""
        ids = np.asarray(ids)
        if self.full or len(ids) == 0:
            return False
        if self._max_tokens is not None:
            ids = ids[: self._max_tokens - self.num_tokens - 1]
        document = np.empty(len(ids) + 1, dtype=self._dtype)
        document[:-1] = ids
        document[-1] = self._eos_id
        self._documents.append(document)
        self.names.append(name)
        self.num_tokens += len(document)
        return True

    def pop(self, index: int) -> tuple[str, np.ndarray]:
        """Take a document out again: its name and its ids without eos."""
        document = self._documents.pop(index)
        self.num_tokens -= len(document)
        return self.names.pop(index), document[:-1]

    def build(self) -> TokenStream:
        """The stream of all documents in the order of their `add`."""
        starts = np.zeros(self.num_documents, dtype=np.int64)
        np.cumsum([len(document) for document in self._documents[:-1]], out=starts[1:])
        tokens = np.concatenate(self._documents) if self._documents else np.empty(0, dtype=self._dtype)
        return TokenStream(tokens=tokens, starts=starts)


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """Sequences of `sequence_length` (S) tokens cut from a stream; see the module's head for the rule.

    Items: input_ids int64 [S], labels int64 [S] aligned with them (the model shifts), and with
    `isolate_documents` position_ids int64 [S], which restart at 0 with each document and each sequence.
    transformers reads the restarts as borders for attention, but only if it is given no attention_mask and
    no cache: call the model with use_cache=False.

    last: "pad" fills the last incomplete sequence with `pad_id`, labels -100 (validation: nothing is
          lost); "drop" leaves it out (training: every sequence counts alike) and counts it in
          `num_dropped`, at most S-2 tokens of the whole set.

    Raises DataError for S < 2 and for a stream too short to give one sequence.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        sequence_length: int,
        pad_id: int,
        isolate_documents: bool = False,
        last: str = "pad",
    ):
        if sequence_length < 2:
            raise DataError(
                f"data.sequence_length={sequence_length} leaves nothing to predict: the first token of a sequence is "
                "context only. Set it to 2 or more."
            )
        if last not in ("pad", "drop"):
            raise DataError(f"last={last!r} must be 'pad' or 'drop'.")
        self.stream = stream
        self.sequence_length = sequence_length
        self.pad_id = pad_id
        self.isolate_documents = isolate_documents
        targets = max(stream.num_tokens - 1, 0)
        full, rest = divmod(targets, sequence_length - 1)
        padded = rest > 0 and last == "pad"
        self.num_sequences = full + padded
        self.num_dropped = 0 if padded else rest
        self.num_blank = 0
        if self.num_sequences == 0:
            raise DataError(
                f"{stream.num_tokens} tokens in {stream.num_documents} documents do not fill one sequence of "
                f"data.sequence_length={sequence_length}. Give more text or set data.sequence_length to "
                f"{max(stream.num_tokens, 2)} or less."
            )

    @property
    def num_predicted(self) -> int:
        """How many labels of the whole set are not -100: N minus borders minus what was dropped."""
        reached = self.stream.num_tokens - self.num_dropped
        borders = int(np.searchsorted(self.stream.starts, reached)) if self.isolate_documents else 1
        return reached - borders

    def round_up(self, multiple: int) -> PackedDataset:
        """The same set with blank sequences (all padding, all labels -100) up to a multiple of `multiple`.

        Batches then have one shape and ranks one number of batches, with no sequence given twice, which
        is what a sampler would do to even the ranks out and what would count it twice in a metric.
        """
        rounded = copy.copy(self)
        rounded.num_blank = -self.num_sequences % multiple
        return rounded

    def __len__(self) -> int:
        return self.num_sequences + self.num_blank

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        size = self.sequence_length
        begin = index * (size - 1)
        # A blank sequence lies behind the stream, where this slice is empty.
        window = self.stream.tokens[begin : begin + size] if index < self.num_sequences else self.stream.tokens[:0]
        inputs = np.full(size, self.pad_id, dtype=np.int64)
        inputs[: len(window)] = window
        labels = np.full(size, IGNORED, dtype=np.int64)
        labels[1 : len(window)] = window[1:]
        item = {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
        if self.isolate_documents:
            first, behind = np.searchsorted(self.stream.starts, (begin, begin + len(window)))
            restarts = self.stream.starts[first:behind] - begin
            labels[restarts] = IGNORED
            item["position_ids"] = torch.from_numpy(_positions(size, [*restarts, len(window)]))
        return item


def _positions(size: int, restarts: Sequence[int]) -> np.ndarray:
    """0, 1, 2, ... [size] int64, beginning again at every index in `restarts`; indices of `size` are ignored."""
    steps = np.arange(size, dtype=np.int64)
    last_restart = np.zeros(size, dtype=np.int64)
    inside = [restart for restart in restarts if restart < size]
    last_restart[inside] = inside
    return steps - np.maximum.accumulate(last_restart)
