"""Whole samples to training sequences of one fixed length: packed where they fit, never cut, never seeing each other.

The longest samples are placed first, each into the sequence with the least room that still takes it; the rest of a
sequence is padding. Samples are documents of their own: positions restart at each, its first token is not
predicted, and labels are -100 for all that is not to be learnt.

    samples [a b c] [d e f g] [h i], S = 7, learnt: c, f g, i

    inputs   d e f g a b c     h i _ _ _ _ _
    labels   _ _ f g _ _ c     _ i _ _ _ _ _
    position 0 1 2 3 0 1 2     0 1 0 1 2 3 4
    mask     1 1 1 1 1 1 1     1 1 0 0 0 0 0
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch.utils.data import Dataset
from typing_extensions import override

from lit_models.data.packing import IGNORED, restart_positions
from lit_models.data.streams import TokenStream


def pack_samples(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which samples share a sequence of `size` tokens: best fit, longest first.

    lengths: [samples], each at most `size`.
    Returns sample numbers int64 [samples], those of a sequence together and ascending, and for each sequence where it
    begins in them, int64 [sequences]; sequences are in the order of their first samples.
    """
    sequences: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]
    rooms = 0  # bit r: there is a sequence with room for r tokens
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            sequences[chosen].append(sample)
        else:
            room, chosen = size, len(sequences)
            sequences.append([sample])
        if room > length:
            with_room[room - length].append(chosen)
            rooms |= 1 << (room - length)
    ordered = sorted(sorted(samples) for samples in sequences)
    begins = np.cumsum([0, *map(len, ordered[:-1])], dtype=np.int64)
    return np.array([sample for samples in ordered for sample in samples], dtype=np.int64), begins


class SampleDataset(Dataset[dict[str, torch.Tensor]]):
    """Sequences of `sequence_length` (S) tokens of whole samples; see the module's head for the rule.

    stream: its documents are the samples, each of at most S tokens, with `learn`, which is 0 at each sample's first.
    pack:   several samples a sequence; false gives each its own.

    Items: input_ids, labels, position_ids, int64 [S], and token_mask, bool [S], false for padding. transformers reads
    the restarts of position_ids as borders for attention if it is given no attention_mask and no cache; so what is
    padding, which the experts' balance leaves out, is said by token_mask.
    """

    def __init__(self, stream: TokenStream, *, sequence_length: int, pad_id: int, pack: bool = True) -> None:
        assert stream.learn is not None
        self.stream = stream
        self.sequence_length = sequence_length
        self.pad_id = pad_id
        lengths = np.diff(stream.starts, append=stream.num_tokens)
        if pack:
            self._samples, self._begins = pack_samples(lengths, sequence_length)
        else:
            self._samples = self._begins = np.arange(len(lengths))
        self.num_sequences = len(self._begins)
        self.num_blank = 0
        self.num_predicted = int(stream.learn.sum(dtype=np.int64))

    def round_up(self, multiple: int) -> SampleDataset:
        """This set with blank sequences (all padding, all labels -100) up to a multiple of `multiple`."""
        rounded = copy.copy(self)
        rounded.num_blank = -self.num_sequences % multiple
        return rounded

    def __len__(self) -> int:
        return self.num_sequences + self.num_blank

    @override
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        assert self.stream.learn is not None
        inputs = np.full(self.sequence_length, self.pad_id, dtype=np.int64)
        labels = np.full(self.sequence_length, IGNORED, dtype=np.int64)
        restarts, at = [], 0
        for sample in self._samples_of(index):
            begin = int(self.stream.starts[sample])
            last = sample + 1 == self.stream.num_documents
            end = self.stream.num_tokens if last else int(self.stream.starts[sample + 1])
            tokens = self.stream.tokens[begin:end].astype(np.int64)
            inputs[at : at + len(tokens)] = tokens
            labels[at : at + len(tokens)] = np.where(self.stream.learn[begin:end], tokens, IGNORED)
            restarts.append(at)
            at += len(tokens)
        positions = restart_positions(self.sequence_length, [*restarts, at])
        arrays = {"input_ids": inputs, "labels": labels, "position_ids": positions}
        arrays["token_mask"] = np.arange(self.sequence_length) < at
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _samples_of(self, index: int) -> list[int]:
        if index >= self.num_sequences:
            return []
        end = self._begins[index + 1] if index + 1 < self.num_sequences else len(self._samples)
        return self._samples[self._begins[index] : end].tolist()
