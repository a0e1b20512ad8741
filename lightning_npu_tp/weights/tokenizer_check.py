"""Whether the tokenizer files of an exported folder do what those that they were copied from do.

Each side is loaded as a user would load it and encodes the same text. Code that lies in a folder is not run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

# Words, two scripts, an emoji, digits, spaces that tokenizers treat in their own ways, and what looks special.
PROBE = "Hello, world! 你好 🙂 naïve café\n\tx  =  3.1415 # 42\r\n<|end|> </s> [INST] "

Encode = Callable[[str], list[int]]


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


def _with_tokenizers(path: Path) -> Encode:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path if path.is_file() else path / "tokenizer.json"))
    return lambda text: list(tokenizer.encode(text).ids)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
