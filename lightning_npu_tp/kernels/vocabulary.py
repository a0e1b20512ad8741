"""What is done about ids and labels outside of the vocabulary, where a device can say so without asking the host.

On a rank that holds a part of the vocabulary such an id is simply another rank's, on every rank: nothing would be
looked up, and a loss would come out that looks like one. Both functions take what was computed from the ids and return
it; `plain.mark_outside` is the one for devices that can do neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_npu_tp.errors import VocabularyError


def raise_outside(values: Tensor, ids: Tensor, is_outside: Tensor, *, what: str, vocab_size: int) -> Tensor:
    """Raise VocabularyError for the first id that is outside: for the CPU, where looking costs nothing.

    values: [*ids, …], computed from them; returned as they are.
    ids: int64. is_outside: bool of the same shape. what: "token id" or "label".
    """
    if bool(is_outside.any()):
        where = is_outside.nonzero()[0].tolist()
        raise VocabularyError(_outside(what, vocab_size, f"{int(ids[tuple(where)])} at {where}"))
    return values


def assert_inside(values: Tensor, ids: Tensor, is_outside: Tensor, *, what: str, vocab_size: int) -> Tensor:
    """As `raise_outside`, by an assertion that the device reports later: CUDA's, which ends all work on it."""
    torch._assert_async(~is_outside.any(), _outside(what, vocab_size, "one of this batch"))
    return values


def _outside(what: str, vocab_size: int, which: str) -> str:
    ignored = "; -100 is what counts nothing" if what == "label" else ""
    return (
        f"A {what} is not in the model's vocabulary, 0 to {vocab_size - 1}{ignored}: {which}. Use the tokenizer that "
        f"belongs to the model, or a model whose vocab_size is at least the tokenizer's number of ids."
    )
