"""Text to token ids and back: plain bytes, or a Hugging Face tokenizer from a local folder or file.

The rest of the data side sees only the small interface `Tokenizer`, so that a user's own tokenizer
needs five attributes and two methods. Nothing here reads documents, adds begin tokens or contacts a
network: `encode` returns the text's own tokens and the packer closes each document with `eos_id`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lightning_npu_tp.errors import DataError


class Tokenizer(Protocol):
    """What the data side needs of a tokenizer.

    name:       a few words for summaries and error messages.
    vocab_size: one more than the largest id that `encode`, `eos_id` or `pad_id` can give.
    eos_id:     closes every document.
    pad_id:     fills the last sequence of a validation set; never a target.
    """

    name: str
    vocab_size: int
    eos_id: int
    pad_id: int

    def encode(self, text: str) -> np.ndarray:
        """Token ids [tokens] of `text` alone: no begin, end or other special token is added."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, without eos and padding."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, then bos 256, eos 257, pad 258. Every text round-trips."""

    name = "bytes"
    bos_id = 256
    eos_id = 257
    pad_id = 258
    vocab_size = 259

    def encode(self, text: str) -> np.ndarray:
        """UTF-8 bytes of `text`, uint8 [bytes]."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; special ids are dropped, a character cut in the middle becomes U+FFFD."""
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A transformers tokenizer behind the interface `Tokenizer`; made by `load_tokenizer`."""

    def __init__(self, tokenizer: Any, *, name: str):
        self.name = name
        self._tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        # Padding is never a target, so eos serves where a tokenizer names no pad token (most causal models').
        self.pad_id: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # Not len(tokenizer): ids added by hand may leave gaps, and the embedding must reach the largest one.
        self.vocab_size = 1 + max(self.eos_id, self.pad_id, *tokenizer.get_vocab().values())

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int64 [tokens]; `verbose` is off because packing makes the length limit moot."""
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return np.asarray(encoded["input_ids"], dtype=np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids` without special tokens; spaces are left as they are."""
        plain = [int(i) for i in ids]
        return self._tokenizer.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load_tokenizer(path: str | Path | None, *, eos_token: str | None = None) -> Tokenizer:
    """The tokenizer at `path`: None means bytes; else a Hugging Face folder or a `tokenizer.json`.

    Only local files are read and no code from the folder is run. A `tokenizer.json` that lies beside
    its `tokenizer_config.json` is loaded with it. `eos_token` names the end token where the files do not.

    Raises DataError for a missing path, files that are no tokenizer, and a tokenizer without eos.
    """
    if path is None:
        return ByteTokenizer()
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(
            f"data.tokenizer={str(path)!r} does not exist. Give the folder that holds tokenizer.json and "
            "tokenizer_config.json (a checkpoint's folder will do), or null for plain bytes."
        )
    tokenizer = _load_files(path)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise DataError(
                f"data.eos_token={eos_token!r} is not in the vocabulary of the tokenizer {str(path)!r}. "
                f"Its special tokens are {tokenizer.all_special_tokens or 'none'}."
            )
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token_id is None:
        known = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        raise DataError(
            f"The tokenizer {str(path)!r} names no end token (eos), which closes every document. Set data.eos_token "
            f"to one of its tokens (it adds {known or 'none'}), or eos_token in its tokenizer_config.json."
        )
    return HuggingFaceTokenizer(tokenizer, name=str(path))


def _load_files(path: Path) -> Any:
    """A transformers tokenizer from a folder or a tokenizer.json, or DataError with transformers' own reason."""
    # Imported here because it takes seconds and the default tokenizer needs none of it.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if path.is_file() and path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").exists():
        path = path.parent
    try:
        if path.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
        raise DataError(
            f"data.tokenizer={str(path)!r} cannot be loaded as a Hugging Face tokenizer: {error} "
            "Give a folder with tokenizer.json and tokenizer_config.json, or null for plain bytes."
        ) from error


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raise DataError if `tokenizer` can give an id for which the model has no embedding row.

    A model with more rows than ids is fine: checkpoints round their vocabulary up.
    """
    if tokenizer.vocab_size > model_vocab_size:
        raise DataError(
            f"The tokenizer ({tokenizer.name}, data.tokenizer) has {tokenizer.vocab_size} ids, but the model's "
            f"vocabulary (model vocab_size) has {model_vocab_size}. Set the model's vocab_size to at least "
            f"{tokenizer.vocab_size}, or data.tokenizer to the tokenizer that the model was trained with."
        )
