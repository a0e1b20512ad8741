"""Fetch a model from the Hugging Face hub, or a mirror, into a plain folder, and check every file's hash.

What is ModelScope's alone is in modelscope_download.py.

Only what loading needs: safetensors and their index, config, generation config, tokenizer. The same weights in other
formats are left alone. huggingface_hub fetches, and tries again where a connection breaks; that what has come is what
was listed, and no more, is looked after here. Nothing here runs code from the repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_npu_tp.checkpoint.files import size_in_words
from lightning_npu_tp.checkpoint.locks import hold
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

    @property
    def has_hash(self) -> bool:
        """Whether the hub says which content it has, so that a copy can be verified."""
        return bool(self.sha256 or self.git_hash)


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
        """Bytes of all files together."""
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
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT

    api = HfApi(endpoint=endpoint, token=token)
    with _explained(repo_id, revision, endpoint):
        # Without a time-out the client waits for ever.
        info = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=HF_HUB_DOWNLOAD_TIMEOUT)
    files = [
        RemoteFile(
            name=file.rfilename,
            bytes=int(file.size or (file.lfs.size if file.lfs else 0)),
            sha256=file.lfs.sha256 if file.lfs else None,
            git_hash=file.blob_id if not file.lfs else None,
        )
        for file in info.siblings or []
    ]
    return listing_of(repo_id, revision, str(info.sha), files)


def listing_of(repo_id: str, revision: str, commit: str, files: Iterable[RemoteFile]) -> Listing:
    """What would be fetched of a repository with these files. Raises ConfigError for one without safetensors."""
    every = sorted(files, key=lambda file: file.name)
    wanted = [file for file in every if is_wanted(file.name)]
    if not any(file.name.endswith(".safetensors") for file in wanted):
        others = sorted({Path(file.name).suffix for file in every} & {".bin", ".pt", ".pth", ".gguf", ".onnx"})
        raise ConfigError(
            f"{repo_id} (revision {revision}) holds no safetensors"
            f"{', only ' + ', '.join(others) if others else ''}. Files of other formats are not loaded, since they can "
            f"run code; look for a revision or a repository of the same model with model.safetensors."
        )
    return Listing(repo_id, commit, wanted, [file.name for file in every if file not in wanted])


def require_space(listing: Listing, folder: Path) -> int:
    """Free bytes where `folder` is or will be. Raises ConfigError if what is not there yet does not fit."""
    existing = next(place for place in [folder.absolute(), *folder.absolute().parents] if place.exists())
    needed = sum(file.bytes for file in listing.files if not _has_size(folder / file.name, file.bytes))
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConfigError(
            f"{listing.repo_id} needs {needed:,} more bytes ({size_in_words(needed)}) in {folder}, and {free:,} are "
            f"free there. Free some space, or choose another folder."
        )
    return free


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def getter(listing: Listing, *, endpoint: str | None, token: str | None) -> Callable[[RemoteFile, Path], None]:
    """What fetches one file of the listing into a folder, no more than its size."""
    from huggingface_hub import hf_hub_download

    def get(file: RemoteFile, folder: Path) -> None:
        with _explained(listing.repo_id, listing.commit, endpoint, folder / file.name):
            hf_hub_download(
                listing.repo_id,
                file.name,
                revision=listing.commit,
                local_dir=folder,
                endpoint=endpoint,
                token=token,
                # A file that is there and damaged would be taken for good.
                force_download=True,
                tqdm_class=_bar_that_ends_at(file.bytes),
            )

    return get


def fetch(
    listing: Listing,
    folder: Path,
    get: Callable[[RemoteFile, Path], None],
    *,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Fetch the files that are missing or not right, one after the other; a call after an interruption goes on.

    get:  fetches one file into the folder; of the hub that the listing is of.
    tell: is told each file when it is there, and whether its hash was compared.
    Raises CheckpointError that names a file which is broken off, or not what the hub says it is, and for a folder into
    which another process is downloading.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder.absolute(), "downloading"):
        for left in folder.glob(".cache/huggingface/download/*.incomplete"):
            # Of a call that was killed; huggingface_hub does not go on with it.
            left.unlink()
        for number, file in enumerate(listing.files, start=1):
            path = folder / file.name
            if not _is_right(path, file):
                get(file, folder)
                _require_right(path, file)
            how = "verified" if file.has_hash else "its size is right, the hub gives no hash"
            tell(f"{number}/{len(listing.files)} {file.name}: {size_in_words(file.bytes)}, {how}")
    _require_indexed(folder, listing.files)


def _bar_that_ends_at(size: int) -> Any:
    """A progress bar for huggingface_hub that raises when more than `size` bytes come: nothing else stops them."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        received = 0

        @override
        def update(self, n: float | None = 1) -> bool | None:
            self.received += int(n or 0)
            if self.received > size:
                raise OSError(f"the server sends more than the {size:,} bytes that the hub names")
            return super().update(n)

        def update_transfer(self, n: float | None = 1) -> None:
            """What hf_xet has received over the network, which may be more than the file: not counted."""

        def set_transfer_postfix_str(self, *args: Any, **kwargs: Any) -> None:
            """hf_xet's speed, which is not shown."""

    return Bar


def _is_right(path: Path, file: RemoteFile) -> bool:
    return _has_size(path, file.bytes) and _hash_is_right(path, file)


def _require_right(path: Path, file: RemoteFile) -> None:
    if _is_right(path, file):
        return
    size = path.stat().st_size
    path.unlink()
    what = "is not what the hub says it is: its hash differs"
    if size != file.bytes:
        what = f"has {size:,} bytes instead of {file.bytes:,}"
    raise CheckpointError(f"{path} {what}, and was removed. Run the download again; it fetches only this file anew.")


def _hash_is_right(path: Path, file: RemoteFile) -> bool:
    if not file.has_hash:
        return True
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.bytes, usedforsecurity=False)
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == (file.sha256 or file.git_hash)


def _require_indexed(folder: Path, files: Iterable[RemoteFile]) -> None:
    """Every file that the index names must be among those that were fetched."""
    index = folder / "model.safetensors.index.json"
    names = {file.name for file in files}
    if index.name not in names:
        return
    missing = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) - names)
    if missing:
        raise CheckpointError(f"{index} names files that the repository does not hold: {', '.join(missing[:5])}.")


@contextmanager
def _explained(repo_id: str, revision: str, endpoint: str | None, file: Path | None = None) -> Iterator[None]:
    """Errors of huggingface_hub and of the network become one sentence with what to do."""
    from huggingface_hub import errors

    where = endpoint or os.environ.get("HF_ENDPOINT") or "the Hugging Face hub"
    # The first that fits: some are kinds of others.
    mistakes = {
        errors.GatedRepoError: f" is gated: accept its terms on its page at {where}, then run `hf auth login` or name "
        f"the variable that holds your token with --token-env.",
        errors.RepositoryNotFoundError: f" was not found at {where}: the name (OWNER/NAME) is wrong, or it is private "
        f"and needs a token (--token-env).",
        errors.RevisionNotFoundError: " was not found: the repository has no such revision (--revision).",
        errors.HFValidationError: "",
    }
    try:
        yield
    except Exception as error:
        for kind, mistake in mistakes.items():
            if isinstance(error, kind):
                raise ConfigError(f"{repo_id} (revision {revision}){mistake or f': {error}'}") from error
        if isinstance(error, errors.OfflineModeIsEnabled):
            raise CheckpointError(
                "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so nothing is fetched. Unset it, or copy the model's "
                "folder here by hand."
            ) from error
        if isinstance(error, OSError) and error.errno is not None and file is not None:
            raise CheckpointError(f"{file} cannot be written: {error.strerror}.") from error
        about = f" while fetching {file.name}" if file is not None else ""
        raise CheckpointError(
            f"{where} cannot be reached, or broke off{about} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). Run the command again to go on with the files that are missing; a "
            f"mirror is set with --endpoint, a proxy with HTTPS_PROXY. Without a network, copy the model's folder here "
            f"by hand."
        ) from error
