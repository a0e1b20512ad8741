"""A folder of finished files per key: one process builds it, the others wait, all later ones map the same files.

It is built under a temporary name and renamed when it is whole, so a killed build leaves nothing that is taken for a
cache. Every file's size and checksums are in `cache.json`; what does not agree with them is built anew. What is in
the files is not known here.

Opening checks up to 4 GiB against the checksums, in blocks of 16 MiB; of larger ones as many blocks, evenly spread.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_npu_tp import DataError
from lightning_npu_tp.checkpoint.files import (
    PARTIAL,
    beside,
    crc32_of,
    delete,
    fsync_file,
    left_beside,
    replace_whole,
    sealed_json,
    unsealed_json,
)
from lightning_npu_tp.checkpoint.locks import Holder, hold
from lightning_npu_tp.checkpoint.regular_files import is_plain_name, read_small, regular_size

_NOTES = "cache.json"
_FORMAT = 2
_BLOCK = 2**24
_MOST_BLOCKS = 256
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def default_folder() -> Path:
    """Where a user's caches lie: $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_npu_tp" / "tokens"


def open_or_build(
    folder: Path, key: str, build: Callable[[Path], dict[str, Any]], *, most_bytes: int | None = None
) -> tuple[Path, dict[str, Any]]:
    """The cache `folder/key` and what `build` told about it; built if it is missing or damaged.

    build:      writes files into the folder that it is given, without subfolders, and returns plain values.
    most_bytes: that it may need, for the message where the disk is full.
    Raises DataError, naming the folder and the bytes, where it cannot be written. What `build` raises passes.
    """
    target = folder / key
    told = _open(target, quiet=True)
    if told is not None:
        return target, told
    partial = beside(target, PARTIAL)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with hold(target, "building", waiting=_Patience()):
            told = _open(target)  # another process may have been faster
            if told is None:
                told = _build(target, partial, build)
    except OSError as error:
        raise _refusal(error, folder, partial, most_bytes) from error
    finally:
        delete(partial)
    return target, told


def _build(target: Path, partial: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    for left, name, _ in left_beside(target.parent):
        if name == target.name:
            delete(left)  # under the lock nobody else builds
    partial.mkdir()
    told = build(partial)
    files = {path.name: _checksums(path) for path in sorted(partial.iterdir())}
    (partial / _NOTES).write_bytes(sealed_json({"format": _FORMAT, "told": told, "files": files}))
    for path in partial.iterdir():
        fsync_file(path)
    replace_whole(partial, target)
    return told


class _Patience:
    """Says after five seconds, and every minute from then on, for whom this process waits."""

    def __init__(self) -> None:
        self._next_word = time.monotonic() + 5

    def __call__(self, holder: Holder) -> None:
        if time.monotonic() > self._next_word:
            self._next_word += 60
            text = f"Waiting for the token cache that process {holder.pid} on {holder.host} builds."
            print(text, file=sys.stderr, flush=True)


def _open(target: Path, *, quiet: bool = False) -> dict[str, Any] | None:
    """What was told of a cache that is whole; None where it is not."""
    if not target.is_dir():
        return None
    body: dict[str, Any] | str = _checked(target)
    if isinstance(body, dict):
        return body
    if not quiet:
        print(f"The token cache {target} is damaged ({body}) and is built anew.", file=sys.stderr, flush=True)
    return None


def _checked(target: Path) -> dict[str, Any] | str:
    """What was told of a cache, or what is wrong with it."""
    try:
        body = unsealed_json(read_small(target / _NOTES))
        if body is None or body["format"] != _FORMAT:
            return f"{_NOTES} does not fit its checksum"
        total = sum(len(file["blocks"]) for file in body["files"].values())
        step = max(1, -(-total // _MOST_BLOCKS))
        for name, file in body["files"].items():
            path = target / name
            if not is_plain_name(name):
                return f"{_NOTES} names a file outside of it"
            if (size := regular_size(path)) != file["bytes"]:
                return f"{name} has {size} bytes instead of {file['bytes']}"
            for number in range(0, len(file["blocks"]), step):
                if crc32_of(path, number * _BLOCK, _BLOCK) != file["blocks"][number]:
                    return f"{name} does not fit its checksum at byte {number * _BLOCK}"
        told = body["told"]
        return told if isinstance(told, dict) else f"{_NOTES} tells nothing of it"
    except OSError as error:
        return f"{Path(error.filename or target).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{_NOTES} cannot be read: {error}"


def _checksums(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"bytes": size, "blocks": [crc32_of(path, first, _BLOCK) for first in range(0, size, _BLOCK)]}


def _refusal(error: OSError, folder: Path, partial: Path, most_bytes: int | None) -> DataError:
    if error.errno not in _FULL:
        return DataError(
            f"The token cache cannot be written: {error.strerror}: {str(error.filename or folder)!r}. Set "
            "data.cache_dir to a folder that can be written, or to null to keep the tokens in memory."
        )
    done = sum(path.stat().st_size for path in partial.glob("*") if path.is_file())
    parent = next(place for place in (folder, *folder.parents) if place.exists())
    needed = "" if most_bytes is None else f" of at most {most_bytes:,}"
    return DataError(
        f"The token cache does not fit into {str(folder)!r}: {error.strerror} after {done:,} bytes{needed}; "
        f"{shutil.disk_usage(parent).free + done:,} bytes are free there without it. Make room, set data.cache_dir "
        "to a folder on another disk, or lower data.max_tokens."
    )
