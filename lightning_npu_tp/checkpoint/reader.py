"""Read a training checkpoint without running anything that is in it.

torch's own reader unpickles the index freely, and its planner every entry that is no tensor. Here the index is read as
data (index.py), and everything else goes through torch's weights-only loader, out of archives that hold no more than
their file. Before that the ranks verify the files' checksums, each its share.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from typing_extensions import override

from lightning_npu_tp.checkpoint.files import in_place
from lightning_npu_tp.checkpoint.index import read_index as read_index
from lightning_npu_tp.checkpoint.manifest import (
    DCP_FILE,
    MANIFEST_FILE,
    REST_FILE,
    WHAT_TO_DO,
    Manifest,
    archive_problem,
    is_before_manifests,
    packing_problem,
    parse_manifest,
    read_manifest,
    verify,
)
from lightning_npu_tp.checkpoint.peers import PeerFailure, Peers
from lightning_npu_tp.checkpoint.regular_files import open_regular
from lightning_npu_tp.errors import CheckpointError


def open_checkpoint(path: Path, peers: Peers, *, checksums: bool) -> tuple[Path, Manifest | None]:
    """Make sure that a checkpoint is complete and undamaged; every rank calls it.

    Returns where it lies (a save that died may have moved it aside) and its manifest, None for a file and for a folder
    from before manifests. checksums: read every file once, the ranks share the work.
    Raises the same CheckpointError on every rank.
    """
    try:
        where = peers.main(lambda: in_place(path))
        return where, _opened(where, peers, checksums)
    except PeerFailure as failure:
        raise CheckpointError(f"The checkpoint {path} cannot be read: {failure.words()}. {WHAT_TO_DO}") from None


def require_unchanged(path: Path, manifest: Manifest | None, peers: Peers) -> None:
    """After a load: raise CheckpointError if another checkpoint has taken the name since `open_checkpoint`.

    The ranks would have read parts of both, and both have the same shapes. Every rank calls it; None is not looked at.
    """
    if manifest is None:
        return
    try:
        now = peers.main(lambda: asdict(parse_manifest(path)))
    except (CheckpointError, PeerFailure):
        now = {}
    if now != asdict(manifest):
        raise CheckpointError(
            f"The checkpoint {path} was replaced or removed while it was read: a run saves under this name. Load one "
            f"that stays, or start again once that run has ended."
        )


def _opened(path: Path, peers: Peers, checksums: bool) -> Manifest | None:
    kind = peers.main(lambda: _kind(path))
    if kind == "folder":
        manifest = Manifest.from_values(peers.main(lambda: asdict(read_manifest(path))))
        if checksums:
            share = sorted(manifest.files)[peers.rank :: peers.world]
            _require_none(path, peers.each(lambda: verify(path, share)))
        return manifest
    if kind == "file":
        if checksums:
            _require_none(path, [peers.main(lambda: verify(path))])
        return None
    rank_zero_warn(
        f"The checkpoint {path} was written before checkpoints had a {MANIFEST_FILE}: it is read without verification."
    )
    return None


def _kind(path: Path) -> str:
    if path.is_file():
        return "file"
    if is_before_manifests(path):
        return "old folder"
    if (path / MANIFEST_FILE).is_file():
        return "folder"
    if path.is_symlink() and not path.exists():
        raise CheckpointError(
            f"{path} is a link to {path.readlink()}, which does not exist: its save did not end. {WHAT_TO_DO}"
        )
    if (path / DCP_FILE).is_file():
        raise CheckpointError(
            f"The checkpoint {path} is incomplete: it has shards but no {MANIFEST_FILE}, which is written last. The "
            f"run that wrote it died while saving. {WHAT_TO_DO}"
        )
    raise CheckpointError(f"{path} is no checkpoint: neither a folder with {MANIFEST_FILE} nor a file.")


def _require_none(path: Path, problems: list[list[str]]) -> None:
    if found := sorted({problem for part in problems for problem in part}):
        raise CheckpointError(f"The checkpoint {path} is damaged: {'; '.join(found)}. {WHAT_TO_DO}")


def read_object(path: Path, weights_only: bool | None, *, mapped: bool = False) -> Any:
    """A file that torch.save wrote, on the CPU; plain data only unless weights_only is False.

    mapped: its tensors stay in the file.
    """
    if weights_only is not False and (problem := archive_problem(path, checksums=False)):
        raise CheckpointError(f"{problem}. {WHAT_TO_DO}")
    try:
        plain = True if weights_only is None else weights_only
        return torch.load(path, map_location="cpu", weights_only=plain, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise CheckpointError(
            f"{path} holds Python objects that are not plain data{what}; loading them could run code. Store "
            f"plain containers in the hyper-parameters; for a file that you trust, set "
            f"strategy.checkpoint_weights_only=false."
        ) from error
    except Exception as error:
        # Damaged pickles raise all kinds of errors.
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}. {WHAT_TO_DO}") from error


def read_rest(path: Path, weights_only: bool | None) -> dict[str, Any]:
    """What a checkpoint folder holds besides tensors: its meta.pt."""
    rest = read_object(path / REST_FILE, weights_only)
    if not isinstance(rest, dict):
        raise CheckpointError(f"{path / REST_FILE} holds no state of a run, but {type(rest).__name__}. {WHAT_TO_DO}")
    return rest


def load_tensors(tensors: dict[str, Any], path: Path, metadata: Metadata, peers: Peers) -> None:
    """Fill `tensors`, in place, from a folder; every rank calls it."""
    reader = _Reader(path, metadata)
    try:
        with peers.alone_without_a_warning():
            dcp.load(
                tensors,
                storage_reader=reader,
                planner=_Planner(),
                process_group=peers.group,
                no_dist=not peers.together,
            )
    except CheckpointException as error:
        causes = {str(cause) for cause, _ in error.failures.values()}
        raise CheckpointError(f"The checkpoint {path} cannot be loaded: {'; '.join(sorted(causes))}") from error


def not_plain(file: Path, error: pickle.UnpicklingError) -> str:
    """What to say of a file of a folder that holds more than tensors and plain data."""
    return (
        f"{file} holds Python objects that are not plain data; loading them could run code. Do not use this checkpoint "
        f"unless you know who wrote it. ({(str(error).splitlines() or [''])[0]})"
    )


class _NamingFileSystem(FileSystem):
    """Errors while a file is read name the file."""

    @contextmanager
    @override
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase]:
        assert mode == "rb", "a reader writes nothing"
        try:
            with open_regular(Path(path)) as stream:
                yield cast(io.IOBase, stream)
        except CheckpointError:
            raise
        except pickle.UnpicklingError as error:
            raise CheckpointError(not_plain(Path(path), error)) from error
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}. {WHAT_TO_DO}") from error


class _Reader(dcp.FileSystemReader):
    """torch's reader over an index that is in hand."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self.fs = _NamingFileSystem()
        self._metadata = metadata

    @override
    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        if problem := packing_problem(file, sinfo.offset, sinfo.length):
            raise CheckpointError(f"{self.path}/{sinfo.relative_path} {problem}. {WHAT_TO_DO}")
        return super()._slice_file(file, sinfo)

    # No **kwargs: torch takes them as leave to look for other index files.
    @override
    def read_metadata(self) -> Metadata:  # type: ignore[override]
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


class _Planner(DefaultLoadPlanner):
    """torch's planner; entries that are no tensors are plain data."""

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # The parent's torch.load trusts the file; give it one that holds what a careful one has read.
        safe = io.BytesIO()
        torch.save(torch.load(value, map_location="cpu", weights_only=True), safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)
