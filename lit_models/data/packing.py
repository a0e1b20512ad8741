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

Sequences are cut from the stream's array when they are asked for. Which documents, in what order and on which
rank is not decided here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_npu_tp import DataError
from lit_models.data.streams import TokenStream

IGNORED = -100  # torch's and transformers' ignore_index


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """Sequences of `sequence_length` (S) tokens cut from a stream; see the module's head for the rule.

    Items: input_ids int64 [S], labels int64 [S] aligned with them (the model shifts), with
    `isolate_documents` position_ids int64 [S], which restart at 0 with each document and each sequence, and in a set
    with padding token_mask, bool [S], false there.
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
        self.is_padded = rest > 0 and last == "pad"
        self.num_sequences = full + self.is_padded
        self.num_dropped = 0 if self.is_padded else rest
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
        """This set with blank sequences (all padding, all labels -100) up to a multiple of `multiple`.

        Batches then have one shape and ranks one number of batches, with no sequence given twice, which
        is what a sampler would do to even the ranks out and what would count it twice in a metric.
        """
        rounded = copy.copy(self)
        rounded.num_blank = -self.num_sequences % multiple
        return rounded

    def __len__(self) -> int:
        return self.num_sequences + self.num_blank

    @override
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
            item["position_ids"] = torch.from_numpy(restart_positions(size, [*restarts, len(window)]))
        if self.is_padded or self.num_blank:
            item["token_mask"] = torch.arange(size) < len(window)
        return item


def restart_positions(size: int, restarts: Sequence[int]) -> np.ndarray:
    """0, 1, 2, ... [size] int64, beginning again at every index in `restarts`; indices of `size` are ignored."""
    steps = np.arange(size, dtype=np.int64)
    last_restart = np.zeros(size, dtype=np.int64)
    inside = [restart for restart in restarts if restart < size]
    last_restart[inside] = inside
    return steps - np.maximum.accumulate(last_restart)
