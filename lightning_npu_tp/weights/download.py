"""Fetch a model from the Hugging Face hub, or a mirror, into a plain folder, and check every file's hash.

Only what loading needs: safetensors and their index, config, generation config, tokenizer. The same weights in other
formats are left alone. huggingface_hub does the fetching and resumes what was broken off; nothing here runs code from
the repository.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning_npu_tp.checkpoint.files import size_in_words
from lightning_npu_tp.errors import CheckpointError, ConfigError

_WANTED = (
    "config.json",
    "generation_config.json",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "LICENSE*",
)
_CHUNK = 1 << 22


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository: its size, and the sha256 (large files) or git hash (small ones) of its content."""

    name: str
    bytes: int
    sha256: str | None
    git_hash: str | None


@dataclass(frozen=True)
class Listing:
    """What would be fetched.

    commit:  the revision's commit, which is what is fetched even if the branch moves meanwhile.
    skipped: files of the repository that are not needed.
    """

    repo_id: str
    commit: str
    files: list[RemoteFile]
    skipped: list[str]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)


def is_wanted(name: str) -> bool:
    """Whether loading needs a file, by its name in the repository; subfolders hold other formats and variants."""
    if "/" in name:
        return False
    # Adapters, and variants such as model.fp16.safetensors, which repeat the weights.
    if name.endswith(".safetensors"):
        return name == "model.safetensors" or fnmatchcase(name, "model-?????-of-?????.safetensors")
    return any(fnmatchcase(name, pattern) for pattern in _WANTED)


def list_repository(
    repo_id: str, *, revision: str = "main", endpoint: str | None = None, token: str | None = None
) -> Listing:
    """Ask the hub what a repository holds.

    Raises ConfigError for a wrong name, revision or right of access and for a repository without safetensors,
    CheckpointError where the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token)
    with _explained(repo_id, revision, endpoint):
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    siblings = info.siblings or []
    wanted = [file for file in siblings if is_wanted(file.rfilename)]
    if not any(file.rfilename.endswith(".safetensors") for file in wanted):
        others = sorted({Path(file.rfilename).suffix for file in siblings} & {".bin", ".pt", ".pth", ".gguf", ".onnx"})
        raise ConfigError(
            f"{repo_id} (revision {revision}) holds no safetensors"
            f"{', only ' + ', '.join(others) if others else ''}. Files of other formats are not loaded, since they can "
            f"run code; look for a revision or a repository of the same model with model.safetensors."
        )
    files = [
        RemoteFile(
            name=file.rfilename,
            bytes=int(file.size or (file.lfs.size if file.lfs else 0)),
            sha256=file.lfs.sha256 if file.lfs else None,
            git_hash=file.blob_id if not file.lfs else None,
        )
        for file in sorted(wanted, key=lambda file: file.rfilename)
    ]
    return Listing(repo_id, str(info.sha), files, sorted(file.rfilename for file in siblings if file not in wanted))


def require_space(listing: Listing, folder: Path) -> int:
    """Free bytes where `folder` is or will be. Raises ConfigError if what is not there yet does not fit."""
    existing = next(place for place in [folder.absolute(), *folder.absolute().parents] if place.exists())
    needed = sum(file.bytes for file in listing.files if not _has_size(folder / file.name, file.bytes))
    needed -= sum(part.stat().st_size for file in listing.files if (part := _part(folder, file)).exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConfigError(
            f"{listing.repo_id} needs {needed:,} more bytes ({size_in_words(needed)}) in {folder}, and {free:,} are "
            f"free there. Free some space, or choose another folder."
        )
    return free


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def fetch(
    listing: Listing,
    folder: Path,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Fetch what is missing and verify every file; call it again to go on after an interruption.

    tell: is told each file when it is there.
    Raises CheckpointError that names a file which is broken off, or not what the hub says it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(listing.files, start=1):
        path = folder / file.name
        if not (_has_size(path, file.bytes) and _hash_is_right(path, file)):
            with _explained(listing.repo_id, listing.commit, endpoint, path):
                _fetch_one(listing, file, _part(folder, file), endpoint, token)
            _require_right(_part(folder, file), path, file)
            os.replace(_part(folder, file), path)
        tell(f"{number}/{len(listing.files)} {file.name}: {size_in_words(file.bytes)}, verified")
    _require_indexed(folder, listing.files)


def _part(folder: Path, file: RemoteFile) -> Path:
    """Where a file is until it is whole; another version of it has another name."""
    return folder / f".{file.name}.{(file.sha256 or file.git_hash or 'unknown')[:12]}.part"


def _fetch_one(listing: Listing, file: RemoteFile, part: Path, endpoint: str | None, token: str | None) -> None:
    """Append to `part` what it lacks."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(listing.repo_id, file.name, revision=listing.commit, endpoint=endpoint)
    location = get_hf_file_metadata(url, token=token, endpoint=endpoint).location
    headers = build_hf_headers(token=token)
    if urlsplit(location).netloc != urlsplit(url).netloc:
        # A content server: its address holds the permission, and the token is none of its business.
        headers.pop("authorization", None)
    if part.exists() and part.stat().st_size > file.bytes:
        part.unlink()
    with open(part, "ab") as stream:
        http_get(location, stream, resume_size=stream.tell(), headers=headers, expected_size=file.bytes)
        stream.flush()
        os.fsync(stream.fileno())


def _require_right(part: Path, path: Path, file: RemoteFile) -> None:
    size = part.stat().st_size
    if size != file.bytes:
        what = f"has {size:,} bytes instead of {file.bytes:,}"
    elif not _hash_is_right(part, file):
        what = "is not what the hub says it is: its hash differs"
    else:
        return
    part.unlink()
    raise CheckpointError(f"{path} {what}, and was removed. Run the download again; it fetches only this file anew.")


def _hash_is_right(path: Path, file: RemoteFile) -> bool:
    if file.sha256 is None and file.git_hash is None:
        return True
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.bytes, usedforsecurity=False)
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == (file.sha256 or file.git_hash)


def _require_indexed(folder: Path, files: Iterable[RemoteFile]) -> None:
    """Every file that the index names must be among those that were fetched."""
    import json

    index = folder / "model.safetensors.index.json"
    names = {file.name for file in files}
    if index.name not in names:
        return
    missing = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) - names)
    if missing:
        raise CheckpointError(f"{index} names files that the repository does not hold: {', '.join(missing[:5])}.")


class _explained:
    """Errors of huggingface_hub and of the network become one sentence with what to do."""

    def __init__(self, repo_id: str, revision: str, endpoint: str | None, file: Path | None = None) -> None:
        self._what = f"{repo_id} (revision {revision})"
        self._where = endpoint or os.environ.get("HF_ENDPOINT") or "the Hugging Face hub"
        self._file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from huggingface_hub import errors

        if error is None or not isinstance(error, Exception):
            return
        if isinstance(error, errors.GatedRepoError):
            raise ConfigError(
                f"{self._what} is gated: accept its terms on its page at {self._where}, then run `hf auth login` or "
                f"name the variable that holds your token with --token-env."
            ) from error
        if isinstance(error, errors.RepositoryNotFoundError):
            raise ConfigError(
                f"{self._what} was not found at {self._where}: the name (OWNER/NAME) is wrong, or it is private and "
                f"needs a token (--token-env)."
            ) from error
        if isinstance(error, errors.RevisionNotFoundError):
            raise ConfigError(
                f"{self._what} was not found: the repository has no such revision (--revision)."
            ) from error
        if isinstance(error, errors.HFValidationError):
            raise ConfigError(f"{self._what}: {error}") from error
        if isinstance(error, errors.OfflineModeIsEnabled):
            raise CheckpointError(
                "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so nothing is fetched. Unset it, or copy the model's "
                "folder here by hand."
            ) from error
        if isinstance(error, OSError) and getattr(error, "errno", None) is not None and self._file is not None:
            raise CheckpointError(f"{self._file} cannot be written: {error.strerror}.") from error
        about = f" while fetching {self._file.name}" if self._file is not None else ""
        raise CheckpointError(
            f"{self._where} cannot be reached, or broke off{about} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). Run the command again to go on where it stopped; a mirror is set "
            f"with --endpoint, a proxy with HTTPS_PROXY. Without a network, copy the model's folder here by hand."
        ) from error
