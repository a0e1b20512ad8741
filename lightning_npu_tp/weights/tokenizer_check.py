"""Whether a tokenizer does what its files say, and the files of an exported folder what those they were copied from do.

Each side is loaded as a user would load it and encodes the same text. Code that lies in a folder is not run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

# Words, two scripts, an emoji, digits, spaces that tokenizers treat in their own ways, and what looks special.
PROBE = "Hello, world! 你好 🙂 naïve café\n\tx  =  3.1415 # 42\r\n<|end|> </s> [INST] "

# What splitters, normalizers and the treatment of spaces do in different ways, and nothing that may be a special token.
_WORDS = (
    "User: How aren't you?\n    if n < 2:\n\treturn  x[0]\r\n\r\n你好，世界！ 数据123456 3.14159 don'T naïve café "
    "\ufb01 e\u0301 🙂\u200d Größe (A_b)+$%^&*~ http://a.b/c?d=1  \u00a0end \n"
)

Encode = Callable[[str], list[int]]


def difference_from_file(tokenizer: Any, folder: Path) -> str | None:
    """How a tokenizer of transformers encodes a text otherwise than its folder's tokenizer.json; None if it does not.

    transformers builds some classes' rules anew, whatever the file says; the class is a word in tokenizer_config.json.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    wanted = _with_tokenizers(folder, add_special_tokens=False)(_WORDS)
    found = list(tokenizer(_WORDS, add_special_tokens=False, verbose=False)["input_ids"])
    if found == wanted:
        return None
    return (
        f"transformers loads it as {type(tokenizer).__name__}, which encodes a text into other ids than the folder's "
        f"tokenizer.json says ({len(found)} where that has {len(wanted)}). Set tokenizer_class in its "
        'tokenizer_config.json to "PreTrainedTokenizerFast", which takes the file as it is'
    )


def compare_tokenizers(source: Path, folder: Path) -> tuple[str, bool]:
    """A sentence on how the tokenizer of `folder` compares with `source`, a folder or tokenizer.json; and if it fits.

    A source that does not load itself cannot be compared with, which is said and is no misfit.
    """
    problems = []
    for load in (_with_transformers, _with_tokenizers):
        try:
            wanted = load(source)(PROBE)
        except Exception as error:  # whatever a user would meet
            problems.append(_first_line(error))
            continue
        try:
            found = load(folder)(PROBE)
        except Exception as error:
            return f"the tokenizer of the folder does not load, though its source does: {_first_line(error)}", False
        if found != wanted:
            at = next((n for n, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), len(wanted))
            return f"the tokenizer encodes a text otherwise than {source}, from token {at} on", False
        return f"Its tokenizer loads and encodes a text into the same {len(wanted)} ids as {source}.", True
    return f"The tokenizer {source} does not load, so its copy was not compared: {'; '.join(problems)}", True


def loading_problem(path: Path) -> str:
    """Why the tokenizer of a folder does not load and encode a text, or an empty text."""
    problems = []
    for load in (_with_transformers, _with_tokenizers):
        try:
            load(path)(PROBE)
        except Exception as error:  # whatever a user would meet
            problems.append(_first_line(error))
            continue
        return ""
    return "; ".join(problems)


def _with_transformers(path: Path) -> Encode:
    if path.is_file():
        raise ValueError(f"{path.name} is no folder")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return lambda text: list(tokenizer(text)["input_ids"])


def _with_tokenizers(path: Path, *, add_special_tokens: bool = True) -> Encode:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path if path.is_file() else path / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
