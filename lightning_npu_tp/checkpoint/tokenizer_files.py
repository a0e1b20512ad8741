"""A tokenizer's files: which a folder has, and the copy of them that a checkpoint carries.

An export takes the copy. A path in a manifest would have it read wherever whoever wrote the manifest liked, and finds
nothing on another machine.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from lightning_npu_tp.errors import ConfigError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
)
GENERATION_FILE = "generation_config.json"
# The path that a manifest gives for files that lie beside it.
HERE = "."


def tokenizer_files(path: Path) -> list[Path]:
    """A tokenizer's files: of a folder, or of the folder of a tokenizer.json.

    Raises ConfigError where there are none.
    """
    folder = path.parent if path.is_file() else path
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if path.is_file() and path not in found:
        # A tokenizer.json under another name: nothing beside it is known to belong to it.
        found = [path]
    if not found:
        raise ConfigError(
            f"The tokenizer {path} does not exist or holds no tokenizer files. Give the folder that holds "
            f"tokenizer.json, with --tokenizer, or --tokenizer none to export without one."
        )
    return found


def contents_to_keep(path: Path, model_types: Collection[str]) -> dict[str, bytes]:
    """Name -> content of what a checkpoint carries of the tokenizer at `path`; nothing where it has no files.

    model_types: of the models in the checkpoint; the generation config of a folder of one of these comes along.
    """
    try:
        files = tokenizer_files(path)
        kept = {file.name if file.name in TOKENIZER_FILES else "tokenizer.json": file.read_bytes() for file in files}
        beside = path / GENERATION_FILE
        if path.is_dir() and beside.is_file() and model_type(path) in model_types:
            kept[GENERATION_FILE] = beside.read_bytes()
    except (ConfigError, OSError):
        # Training goes on without; an export then asks for it.
        return {}
    return kept


def model_type(folder: Path) -> str | None:
    """The model_type of a folder's config.json; None where it has none."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    found = values.get("model_type") if isinstance(values, dict) else None
    return found if isinstance(found, str) else None
