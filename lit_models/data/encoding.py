"""What reading, encoding and splitting have in common, whatever the documents are: sides, batches, progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lightning_npu_tp import DataError
from lit_models.data.documents import Document
from lit_models.data.streams import StreamBuilder

# Encoded at once: enough for the tokenizer's threads, little enough for memory.
_BATCH_CHARACTERS = 2**20
_BATCH_DOCUMENTS = 512


@dataclass
class Side:
    """One side of the split: its builder, and what is nearest to the other side.

    lowest, highest: (split point, index of its first document, name, number of its documents).
    """

    builder: StreamBuilder
    lowest: tuple[float, int, str, int] = (2.0, 0, "", 0)
    highest: tuple[float, int, str, int] = (-1.0, 0, "", 0)
    noted: int = 0

    def note(self, name: str, point: float) -> None:
        """Look at what was offered since the last call, which is split by `name` as one.

        What is empty or not yet whole is not a document of the builder.
        """
        place, count = self.noted, self.builder.num_documents - self.noted
        if count <= 0:
            return
        self.noted += count
        if point < self.lowest[0]:
            self.lowest = (point, place, name, count)
        if point > self.highest[0]:
            self.highest = (point, place, name, count)


def batches(
    documents: Iterator[Document], wanted: Callable[[Document], bool], done: Callable[[], bool]
) -> Iterator[list[Document]]:
    """Documents to encode together, until `done`; those not wanted are passed over.

    Where reading fails the documents before are given first: they may be all that is needed.
    """
    batch: list[Document] = []
    size = 0
    try:
        for document in documents:
            if not wanted(document):
                if done():
                    break
                continue
            batch.append(document)
            size += len(document.text)
            if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
                yield batch
                batch, size = [], 0
    except DataError:
        yield batch
        raise
    yield batch


def cut_parts(documents: Iterator[Document], place_to_cut: Callable[[str], int | None]) -> Iterator[Document]:
    """Documents that come in parts, cut anew where the tokenizer says that a cut changes no token.

    What it does not cut is held until it is whole.
    """
    held: list[str] = []
    for document in documents:
        if document.ends and not held:
            yield document
            continue
        held.append(document.text)
        text = "".join(held) if document.ends or len(held) > 1 else document.text
        cut = place_to_cut(text)
        while cut:
            yield Document(name=document.name, text=text[:cut], ends=False)
            text = text[cut:]
            cut = place_to_cut(text)
        held = [text]
        if document.ends:
            yield Document(name=document.name, text=text)
            held = []


class Progress:
    """Says on stderr how far the encoding is, where it takes longer than a few seconds."""

    def __init__(self, total_bytes: int, *, first: float = 5.0, every: float = 10.0) -> None:
        self._total = total_bytes
        self._begin = time.monotonic()
        self._next = self._begin + first
        self._every = every
        self._characters = 0
        self._spoke = False

    def add(self, characters: int, tokens: int) -> None:
        """So many more characters are done; `tokens` is the number of training tokens so far."""
        self._characters += characters
        now = time.monotonic()
        if now < self._next:
            return
        self._next, self._spoke = now + self._every, True
        rate = self._characters / (now - self._begin) / 1e6
        print(
            f"encoding: {self._characters / 1e6:,.0f} M characters of {self._total / 1e6:,.0f} MB, "
            f"{tokens / 1e6:,.1f} M tokens, {rate:.1f} M characters/s",
            file=sys.stderr,
            flush=True,
        )

    def end(self) -> None:
        """Print that encoding is done, where its progress was printed at all."""
        if self._spoke:
            print(f"encoding: done after {time.monotonic() - self._begin:.0f} s", file=sys.stderr, flush=True)
