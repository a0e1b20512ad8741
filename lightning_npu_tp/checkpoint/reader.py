"""Read a training checkpoint without running anything that is in it.

torch's own reader unpickles the index freely, and its planner every entry that is no tensor. Here the index may name
the few classes that an index is made of, and everything else goes through torch's weights-only loader. Before that the
ranks verify the files' checksums, each its share.
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
from lightning_npu_tp.checkpoint.manifest import (
    DCP_FILE,
    MANIFEST_FILE,
    REST_FILE,
    WHAT_TO_DO,
    Manifest,
    is_before_manifests,
    read_manifest,
    verify,
)
from lightning_npu_tp.checkpoint.peers import PeerFailure, Peers
from lightning_npu_tp.errors import CheckpointError

_INDEX_MODULES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    # Folders written before manifests store where they were.
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}


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


def read_object(path: Path, weights_only: bool | None) -> Any:
    """A file that torch.save wrote, on the CPU; plain data only unless weights_only is False."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True if weights_only is None else weights_only)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise CheckpointError(
            f"{path} holds Python objects that are not plain data{what}; loading them could run code. Store "
            f"plain containers in the hyper-parameters; for a file that you trust, set "
            f"strategy.checkpoint_weights_only=false."
        ) from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. {WHAT_TO_DO}") from error


def read_rest(path: Path, weights_only: bool | None) -> dict[str, Any]:
    """What a checkpoint folder holds besides tensors: its meta.pt."""
    return read_object(path / REST_FILE, weights_only)


def read_index(path: Path) -> Metadata:
    """The index of a folder's tensors. Raises CheckpointError if it names anything that an index is not made of."""
    file = path / DCP_FILE
    try:
        with open(file, "rb") as stream:
            metadata = _IndexUnpickler(stream).load()
    except CheckpointError as error:
        raise CheckpointError(f"{file} {error}") from None
    except Exception as error:
        # Damaged pickles raise all kinds of errors.
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {error}. {WHAT_TO_DO}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{file} holds {type(metadata).__name__} instead of an index. {WHAT_TO_DO}")
    return metadata


class _IndexUnpickler(pickle.Unpickler):
    """Makes no object but those that an index is made of."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        if name in _INDEX_MODULES.get(module, ()) or (module == "torch" and _is_dtype(name)):
            return super().find_class(module, name)
        raise CheckpointError(
            f"names {module}.{name}, which no index of tensors holds; loading it could run code. Do not use this "
            f"checkpoint unless you know who wrote it."
        )


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


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


class _NamingFileSystem(FileSystem):
    """Errors while a file is read name the file."""

    @contextmanager
    @override
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase]:
        assert mode == "rb", "a reader writes nothing"
        try:
            with open(path, mode) as stream:
                yield cast(io.IOBase, stream)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} holds Python objects that are not plain data; loading them could run code. Do not use this "
                f"checkpoint unless you know who wrote it. ({str(error).splitlines()[0]})"
            ) from error
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}. {WHAT_TO_DO}") from error


class _Reader(dcp.FileSystemReader):
    """torch's reader over an index that is in hand."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self.fs = _NamingFileSystem()
        self._metadata = metadata

    # No **kwargs: torch takes them as leave to look for other index files.
    @override
    def read_metadata(self) -> Metadata:  # type: ignore[override]
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        for info in self._metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise CheckpointError(f"{self.path}/{DCP_FILE} points outside of the checkpoint: {info.relative_path}")
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
