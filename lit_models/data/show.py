"""A batch as a person reads it: its text, what of it is learnt, where documents begin, and the counts.

On a terminal what is learnt is green and the rest dim; in a pipe, or with NO_COLOR, learnt text stands in «…». Each
sequence's first token is context in any case. It shows what the model is given, not what was meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text
from torch import Tensor

from lit_models.data.packing import IGNORED
from lit_models.data.tokenizers import ByteTokenizer, Tokenizer

_LEARNT, _CONTEXT, _PADDING = 1, 0, -1
_STYLES = {_LEARNT: "bold green", _CONTEXT: "dim"}


def show_batch(batch: Mapping[str, Tensor], tokenizer: Tokenizer, console: Console, *, most_tokens: int | None) -> None:
    """Print every sequence of a batch, at most so many tokens of each, and the counts of the whole batch."""
    marks = not console.is_terminal or console.no_color
    key = "«learnt» not learnt" if marks else "[bold green]learnt[/] [dim]not learnt[/]"
    inputs = {name: value.numpy() for name, value in batch.items()}
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
    console.print(f"batch: {shapes}; {key}; | positions begin", highlight=False, soft_wrap=True)
    kinds = [_kinds(inputs, row, tokenizer) for row in range(len(inputs["input_ids"]))]
    for row, kind in enumerate(kinds):
        starts = _starts(inputs, row, kind)
        places = f", positions restart at {', '.join(map(str, starts))}" if "position_ids" in inputs else ""
        console.print(f"\nsequence {row}: {_counts(kind)}{places}", style="bold", highlight=False, soft_wrap=True)
        body = _body(inputs["input_ids"][row], kind, starts, tokenizer, marks=marks, most_tokens=most_tokens)
        console.print(body, soft_wrap=True, highlight=False)
    console.print(f"\nbatch: {_counts(np.concatenate(kinds))}", style="bold", highlight=False, soft_wrap=True)


def _kinds(inputs: Mapping[str, np.ndarray], row: int, tokenizer: Tokenizer) -> np.ndarray:
    """For each token whether it is learnt, context or padding, which is the pad tokens at the end without labels."""
    ids, labels = inputs["input_ids"][row], inputs["labels"][row]
    kinds = np.where(labels != IGNORED, _LEARNT, _CONTEXT)
    real = np.flatnonzero((ids != tokenizer.pad_id) | (labels != IGNORED))
    end = 0 if len(real) == 0 else int(real[-1]) + 1
    # Where eos pads, the last document's own eos may be context as well; only positions tell the two apart.
    if end < len(ids) and end and "position_ids" in inputs and inputs["position_ids"][row][end] != 0:
        end += 1
    kinds[end:] = _PADDING
    return kinds


def _starts(inputs: Mapping[str, np.ndarray], row: int, kinds: np.ndarray) -> list[int]:
    """Where documents begin, as far as the model is told; padding is not one."""
    if "position_ids" not in inputs:
        return [0]
    return np.flatnonzero((inputs["position_ids"][row] == 0) & (kinds != _PADDING)).tolist()


def _counts(kinds: np.ndarray) -> str:
    learnt, padding = int((kinds == _LEARNT).sum()), int((kinds == _PADDING).sum())
    return (
        f"{len(kinds):,} tokens: {learnt:,} learnt ({learnt / len(kinds):.0%}), {len(kinds) - learnt - padding:,} "
        f"context, {padding:,} padding"
    )


def _body(
    ids: np.ndarray,
    kinds: np.ndarray,
    starts: Sequence[int],
    tokenizer: Tokenizer,
    *,
    marks: bool,
    most_tokens: int | None,
) -> Text:
    text = Text()
    shown = len(ids) if most_tokens is None else min(len(ids), most_tokens)
    changes = np.flatnonzero(np.diff(kinds[:shown])) + 1
    borders = sorted({0, shown, *changes.tolist(), *(start for start in starts if start < shown)})
    for begin, end in zip(borders, borders[1:], strict=False):
        if begin in starts:
            text.append("|" if begin == 0 else "\n|", style="bold yellow")
        kind = int(kinds[begin])
        if kind == _PADDING:
            text.append(f"\n({end - begin:,} padding)", style="dim")
            continue
        piece = spell(tokenizer, ids[begin:end].tolist())
        text.append(f"«{piece}»" if marks and kind == _LEARNT else piece, style=_STYLES[kind])
    if shown < len(ids):
        text.append(f"\n(… {len(ids) - shown:,} more tokens)", style="dim")
    return text


def spell(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of `ids` with their special tokens, which `decode` leaves out."""
    inner: Any = getattr(tokenizer, "transformers", None)
    if inner is not None:
        return inner.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if isinstance(tokenizer, ByteTokenizer):
        names = {tokenizer.bos_id: b"<bos>", tokenizer.eos_id: b"<eos>", tokenizer.pad_id: b"<pad>"}
        return b"".join(names.get(i) or bytes([i]) for i in ids).decode("utf-8", errors="replace")
    return tokenizer.decode(ids)
