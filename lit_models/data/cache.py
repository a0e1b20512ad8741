"""A folder of finished files per key: one process builds it, the others wait, all later ones map the same files.

It is built under a temporary name and renamed when it is whole, so a killed build leaves nothing that is taken for a
cache. Every file's size and checksums are in `cache.json`; what does not agree with them is built anew. What is in
the files is not known here.

Opening checks up to 4 GiB against the checksums, in blocks of 16 MiB; of larger ones as many blocks, evenly spread.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_npu_tp import DataError

_NOTES = "cache.json"
_FORMAT = 1
_BLOCK = 2**24
_MOST_BLOCKS = 256
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What file systems without locks answer: then two processes may build at once, and the first to finish is kept.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


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
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{key}.lock"):
            told = _open(target)  # another process may have been faster
            if told is None:
                told = _build(folder, key, build, written)
    except OSError as error:
        raise _refusal(error, folder, written, most_bytes) from error
    finally:
        for path in written:
            shutil.rmtree(path, ignore_errors=True)
    return target, told


def _build(folder: Path, key: str, build: Callable[[Path], dict[str, Any]], written: list[Path]) -> dict[str, Any]:
    for left_over in folder.glob(f"{key}.partial-*"):
        shutil.rmtree(left_over, ignore_errors=True)  # under the lock nobody else builds
    partial = folder / f"{key}.partial-{socket.gethostname()}-{os.getpid()}"
    written.append(partial)
    partial.mkdir()
    told = build(partial)
    files = {path.name: _checksums(path) for path in sorted(partial.iterdir())}
    body = {"format": _FORMAT, "told": told, "files": files}
    (partial / _NOTES).write_text(json.dumps({**body, "crc32": _crc_of(body)}))
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    try:
        partial.rename(folder / key)
    except OSError:
        if _open(folder / key) is None:  # without locks another one may have come first
            raise
    return told


def _open(target: Path, *, quiet: bool = False) -> dict[str, Any] | None:
    """What was told of a cache that is whole; None, and it is removed, where it is not."""
    if not target.is_dir():
        return None
    problem = _problem(target)
    if problem is None:
        return json.loads((target / _NOTES).read_text())["told"]
    if not quiet:
        print(f"The token cache {target} is damaged ({problem}) and is built anew.", file=sys.stderr, flush=True)
        shutil.rmtree(target)
    return None


def _problem(target: Path) -> str | None:
    try:
        body = json.loads((target / _NOTES).read_text())
        crc = body.pop("crc32")
        if crc != _crc_of(body) or body["format"] != _FORMAT:
            return f"{_NOTES} does not fit its checksum"
        total = sum(len(file["blocks"]) for file in body["files"].values())
        step = max(1, -(-total // _MOST_BLOCKS))
        for name, file in body["files"].items():
            path = target / name
            if path.stat().st_size != file["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {file['bytes']}"
            with path.open("rb") as stream:
                for number in range(0, len(file["blocks"]), step):
                    stream.seek(number * _BLOCK)
                    if zlib.crc32(stream.read(_BLOCK)) != file["blocks"][number]:
                        return f"{name} does not fit its checksum at byte {number * _BLOCK}"
    except OSError as error:
        return f"{Path(error.filename or target).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{_NOTES} cannot be read: {error}"
    return None


def _checksums(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        blocks = [zlib.crc32(block) for block in iter(lambda: stream.read(_BLOCK), b"")]
    return {"bytes": path.stat().st_size, "blocks": blocks}


def _crc_of(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock file, waiting for another process that does; the system frees it when its holder dies."""
    with path.open("a+") as file:
        next_word = time.monotonic() + 5
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    break
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            if time.monotonic() > next_word:
                file.seek(0)
                print(f"Waiting for the token cache that {file.read() or 'another process'} builds.", file=sys.stderr)
                next_word += 60
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _refusal(error: OSError, folder: Path, written: list[Path], most_bytes: int | None) -> DataError:
    if error.errno not in _FULL:
        return DataError(
            f"The token cache cannot be written: {error.strerror}: {str(error.filename or folder)!r}. Set "
            "data.cache_dir to a folder that can be written, or to null to keep the tokens in memory."
        )
    done = sum(path.stat().st_size for part in written for path in part.glob("*") if path.is_file())
    parent = next(place for place in (folder, *folder.parents) if place.exists())
    needed = "" if most_bytes is None else f" of at most {most_bytes:,}"
    return DataError(
        f"The token cache does not fit into {str(folder)!r}: {error.strerror} after {done:,} bytes{needed}; "
        f"{shutil.disk_usage(parent).free + done:,} bytes are free there without it. Make room, set data.cache_dir "
        "to a folder on another disk, or lower data.max_tokens."
    )
