"""Text to token ids and back: plain bytes, or a Hugging Face tokenizer from a local folder or file.

The rest of the data side sees only the small interface `Tokenizer`, so that a user's own tokenizer
needs five attributes and three methods. Nothing here reads documents, adds begin tokens or contacts a
network: `encode` returns the text's own tokens and the packer closes each document with `eos_id`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lightning_npu_tp import DataError
from lightning_npu_tp.weights.tokenizer_check import difference_from_file


class Tokenizer(Protocol):
    """What the data side needs of a tokenizer.

    name:       a few words for summaries and error messages.
    path:       folder or file that it came from; None where there is none.
    vocab_size: one more than the largest id that `encode`, `eos_id` or `pad_id` can give.
    eos_id:     closes every document.
    pad_id:     fills the last sequence of a validation set; never a target.

    An attribute `bos_id`, or None, is what data.add_bos puts before a document.
    A method `encode_batch(texts) -> list of arrays` is used where there is one. A method `place_to_cut(text)` says
    where the ids of a long text are those of its two parts, or None; files are then read in parts.
    """

    name: str
    path: str | None
    vocab_size: int
    eos_id: int
    pad_id: int

    def encode(self, text: str) -> np.ndarray:
        """Token ids [tokens] of `text` alone: no begin, end or other special token is added."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, without eos and padding."""
        ...

    def fingerprint(self) -> str:
        """Hexadecimal digits that are the same for the same vocabulary and rules, on every machine."""
        ...


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids [tokens] of each text, several texts at a time where the tokenizer can."""
    batched = getattr(tokenizer, "encode_batch", None)
    return batched(texts) if batched is not None else [np.asarray(tokenizer.encode(text)) for text in texts]


def fingerprint_of(tokenizer: Tokenizer) -> str:
    """The tokenizer's fingerprint; of a user's own that has none, what is known of it."""
    method = getattr(tokenizer, "fingerprint", None)
    known = (tokenizer.name, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id)
    return method() if method is not None else _digest(["unnamed", *map(str, known)])


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, then bos 256, eos 257, pad 258. Every text round-trips."""

    name = "bytes"
    path: str | None = None
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

    def place_to_cut(self, text: str) -> int:
        """The whole length of `text`: bytes may be cut anywhere."""
        return len(text)

    def fingerprint(self) -> str:
        """A constant digest: bytes have nothing to configure."""
        return _digest(["bytes", self.vocab_size])


# Texts are encoded in parts of 1 to 2 Mi characters.
_LONG = 2**20
_WINDOW = 2000  # characters on either side of a cut within which the tokens must agree
LONGEST_PART = 2 * _LONG + _WINDOW
_MOST_TRIED = 16


class HuggingFaceTokenizer:
    """A transformers tokenizer behind the interface `Tokenizer`; made by `load_tokenizer`.

    `transformers` is the tokenizer underneath, which holds the chat template.
    """

    def __init__(self, tokenizer: Any, *, name: str, path: str | None = None):
        self.name = name
        self.path = path
        self.transformers = tokenizer
        self._tokenizer = tokenizer
        # None for the few tokenizers that are written in Python: no threads, no offsets.
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        if self._fast is not None:
            self._fast.no_truncation()  # a file may ask for it, and documents must stay whole
            self._fast.no_padding()
        self.eos_id: int = tokenizer.eos_token_id
        self.bos_id: int | None = tokenizer.bos_token_id
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

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [tokens], the same as `encode` gives; long texts in parts, short ones in threads."""
        if self._fast is None:
            return [self.encode(text) for text in texts]
        short = [text for text in texts if len(text) < LONGEST_PART]
        encoded = iter(self._fast.encode_batch_fast(short, add_special_tokens=False))
        return [_ids(next(encoded)) if len(text) < LONGEST_PART else self._encode_long(text) for text in texts]

    def _encode_long(self, text: str) -> np.ndarray:
        assert self._fast is not None
        ids, begin, cut = [], 0, self.place_to_cut(text)
        while cut is not None:
            # One at a time: the library's records of a part take a hundred times its size.
            ids.append(_ids(self._fast.encode_batch_fast([text[begin:cut]], add_special_tokens=False)[0]))
            begin, cut = cut, self.place_to_cut(text, cut)
        ids.append(_ids(self._fast.encode_batch_fast([text[begin:]], add_special_tokens=False)[0]))
        return np.concatenate(ids)

    def place_to_cut(self, text: str, begin: int = 0) -> int | None:
        """A place behind `begin` at which a cut changes no token around it; None if none is found or it is short.

        A text is cut there only if it goes on for more than a `LONGEST_PART` behind `begin`.
        """
        if self._fast is None or len(text) - begin < LONGEST_PART:
            return None
        return next((at for at in _candidates(text, begin + _LONG, begin + 2 * _LONG) if self._may_cut(text, at)), None)

    def _may_cut(self, text: str, at: int) -> bool:
        left, right = text[max(0, at - _WINDOW) : at], text[at : at + _WINDOW]
        assert self._fast is not None
        whole, first, second = self._fast.encode_batch_fast([left + right, left, right], add_special_tokens=False)
        return whole.ids == first.ids + second.ids

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids int32 [tokens] and the characters at which each begins and ends, int64 [tokens]; to mark parts of a text.

        Raises DataError for a tokenizer that is not backed by the tokenizers library.
        """
        if self._fast is None:
            raise DataError(
                f"The tokenizer {self.name!r} cannot tell which characters a token covers, which data=chat needs. Save "
                "it once with a tokenizer.json (AutoTokenizer.from_pretrained(...).save_pretrained(...))."
            )
        encoded = self._fast.encode(text, add_special_tokens=False)
        begins, ends = np.asarray(encoded.offsets, dtype=np.int64).reshape(-1, 2).T
        return np.asarray(encoded.ids, dtype=np.int32), begins, ends

    def fingerprint(self) -> str:
        """Of vocabulary, merges, normalisation and splitting; not of names, chat template or truncation."""
        if self._fast is None:
            rules: Any = sorted(self._tokenizer.get_vocab().items())
        else:
            rules = json.loads(self._fast.to_str())
            # Documents are encoded without what a post-processor adds and without the length settings.
            rules = {key: rules[key] for key in rules.keys() - {"truncation", "padding", "post_processor"}}
        return _digest([type(self).__name__, self.eos_id, self.pad_id, rules])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids` without special tokens; spaces are left as they are."""
        plain = [int(i) for i in ids]
        return self._tokenizer.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _ids(encoding: Any) -> np.ndarray:
    return np.asarray(encoding.ids, dtype=np.int32)


def _candidates(text: str, begin: int, end: int) -> Iterator[int]:
    """Places in text[begin:end] to try a cut at: before lines, then before words; a few of either kind."""
    for pattern in (r"(?<=\S\n)(?=\S)", r"(?<=\n)(?=\S)", r"(?<=\w)(?= \w)"):
        found = (match.start() for match in re.finditer(pattern, text[begin:end]))
        for _, at in zip(range(_MOST_TRIED), found, strict=False):
            yield begin + at


def load_tokenizer(path: str | Path | None, *, eos_token: str | None = None) -> Tokenizer:
    """The tokenizer at `path`: None means bytes; else a Hugging Face folder or a `tokenizer.json`.

    Only local files are read and no code from the folder is run. A `tokenizer.json` that lies beside
    its `tokenizer_config.json` is loaded with it. `eos_token` names the end token where the files do not.

    Raises DataError for a missing path, files that are no tokenizer, a tokenizer without eos, and one that transformers
    loads as a class that encodes otherwise than its tokenizer.json.
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
    return HuggingFaceTokenizer(tokenizer, name=str(path), path=str(path))


def _load_files(path: Path) -> Any:
    """A transformers tokenizer from a folder or a tokenizer.json, or DataError with transformers' own reason."""
    # Imported here because it takes seconds and the default tokenizer needs none of it.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if path.is_file() and path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").exists():
        path = path.parent
    try:
        if path.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        otherwise = difference_from_file(tokenizer, path)
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
        raise DataError(
            f"data.tokenizer={str(path)!r} cannot be loaded as a Hugging Face tokenizer: {error} "
            "Give a folder with tokenizer.json and tokenizer_config.json, or null for plain bytes."
        ) from error
    if otherwise is not None:
        raise DataError(f"data.tokenizer={str(path)!r}: {otherwise}.")
    return tokenizer


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
