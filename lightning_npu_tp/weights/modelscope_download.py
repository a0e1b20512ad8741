"""List and fetch a model of ModelScope by its own library, modelscope_hub, as hub_download.py does from Hugging Face.

`modelscope`'s functions are wrappers around that library which leave the hashes out. What is asked for, the free space
before, sizes and hashes after are hub_download.py's, for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_npu_tp.errors import CheckpointError, ConfigError
from lightning_npu_tp.weights.hub_download import Listing, RemoteFile, listing_of

REVISION = "master"


def list_repository(repo_id: str, *, revision: str, endpoint: str | None, token: str | None) -> Listing:
    """Ask ModelScope what a repository holds; errors as `hub_download.list_repository`'s."""
    with _explained(repo_id, revision):
        found = _api(endpoint, token).list_repo_files(repo_id, "model", revision=revision)
        files = [RemoteFile(one.path, int(one.size), one.sha256, None) for one in found if one.type != "tree"]
    return listing_of(repo_id, revision, revision, files)


def getter(listing: Listing, *, endpoint: str | None, token: str | None) -> Callable[[RemoteFile, Path], None]:
    """What fetches one file of the listing into a folder; the library refuses another size while it comes."""
    api = _api(endpoint, token)

    def get(file: RemoteFile, folder: Path) -> None:
        with _explained(listing.repo_id, listing.commit, file.name):
            api.download_file(
                listing.repo_id,
                "model",
                file.name,
                revision=listing.commit,
                local_dir=folder,
                force=True,
                expected_sha256=file.sha256,
                file_size=file.bytes,
            )

    return get


def _api(endpoint: str | None, token: str | None) -> Any:
    try:
        from modelscope_hub import HubApi
    except ImportError as error:
        raise ConfigError(
            "--from modelscope needs ModelScope's library: pip install 'lightning-npu-tp[modelscope]' "
            f"({type(error).__name__}: {error})."
        ) from error
    return HubApi(endpoint=endpoint, token=token)


@contextmanager
def _explained(repo_id: str, revision: str, file: str = "") -> Iterator[None]:
    """Errors of modelscope_hub and of the network become one sentence with what to do."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        from modelscope_hub import errors

        words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if isinstance(error, errors.NotExistError) and not file:
            raise ConfigError(
                f"{repo_id} (revision {revision}) was not found at ModelScope: the name (OWNER/NAME) or the revision "
                f"is wrong, or it is private and needs a token, named with --token-env ({words})."
            ) from error
        if isinstance(error, errors.AuthenticationError | errors.PermissionDeniedError):
            raise ConfigError(
                f"{repo_id} (revision {revision}) needs a token that may read it: name its variable with --token-env "
                f"({words})."
            ) from error
        about = f" while fetching {file}" if file else ""
        raise CheckpointError(
            f"ModelScope cannot be reached, or broke off{about} ({words}). Run the command again to go on with the "
            f"files that are missing; a mirror is set with --endpoint, a proxy with HTTPS_PROXY."
        ) from error
