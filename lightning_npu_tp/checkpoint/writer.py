"""Write a training checkpoint so that it is there whole or not at all.

Every rank writes into a folder of a temporary name beside the target; sizes and checksums of what each wrote become
the manifest, which is written last; then the folder is renamed. An existing checkpoint of the name is moved aside just
before and deleted after. A failure of any rank reaches all of them, and only the partial folder is lost. What goes
into a checkpoint is training_state.py's, reading it reader.py's.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial as bind
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_npu_tp.checkpoint.files import (
    PARTIAL,
    PREVIOUS,
    Written,
    beside,
    delete,
    fsync_folder,
    left_beside,
    replace_whole,
    size_in_words,
)
from lightning_npu_tp.checkpoint.locks import hold, holder_of, lock_file, patience, reader_of
from lightning_npu_tp.checkpoint.manifest import MANIFEST_FILE, REST_FILE, Manifest
from lightning_npu_tp.checkpoint.peers import PeerFailure, Peers
from lightning_npu_tp.devices.fault_text import find_fault
from lightning_npu_tp.errors import CheckpointError

# What torch.save and the index add to a tensor's own bytes.
_BYTES_PER_ENTRY = 2048
NOTHING_MORE: Mapping[str, bytes] = {}


def rank_file(rank: int) -> str:
    """Name of the file with the state of one rank alone."""
    return f"rank_{rank}.pt"


def serialized(value: Any) -> bytes:
    """The bytes of the file that torch.save makes of `value`."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def bytes_needed(state: Any) -> int:
    """Bytes that a state takes on disk, all ranks together; shards and replicas of a tensor count once."""
    leaves = tree_leaves(state)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) + _BYTES_PER_ENTRY * len(leaves)


def save_folder(
    tensors: dict[str, Any],
    rest: bytes,
    rank_state: bytes,
    path: Path,
    manifest: Manifest,
    peers: Peers,
    more: Mapping[str, bytes] = NOTHING_MORE,
) -> None:
    """Write a sharded checkpoint; every rank calls it.

    tensors:    this rank's shards, on the CPU; kept as they are until this returns.
    rest:       serialized; rank 0's is written.
    rank_state: serialized; every rank's is written.
    manifest:   without files; rank 0's is written.
    more:       further files by name; rank 0's are written.
    Raises the same CheckpointError on every rank.
    """
    whole = {REST_FILE: rest, **more}
    needed = bytes_needed(tensors) + sum(map(len, whole.values())) + peers.world * len(rank_state)
    with _making(path, needed, peers) as partial:
        parts = peers.each(bind(_write_part, tensors, whole, rank_state, partial, peers))
        if None in parts:
            # Unheard of: torch says that a rank failed, and that rank does not know of it.
            raise PeerFailure({parts.index(None): "its part could not be written"})
        peers.main(bind(_complete, partial, path, manifest, cast("list[dict[str, Any]]", parts)))


@contextmanager
def _making(path: Path, needed: int, peers: Peers) -> Generator[Path]:
    """A temporary folder to write into, under the lock of `path`; cleared, and explained, if the writing fails."""
    with ExitStack() as on_main:
        partial: Path | None = None
        try:
            partial = peers.main(bind(_prepare, path, needed, on_main))
            yield partial
        except PeerFailure as failure:
            free = peers.gather(_give_up(path, partial) if peers.is_main else 0)[0]
            fault = find_fault(failure.words())
            # What the device reports has nothing to do with the disk.
            reason = (
                fault.sentence()
                if fault is not None
                else f"It needs {size_in_words(needed)}, and {size_in_words(free)} are free."
            )
            room = "" if fault is not None else "Make room, or save to another folder. "
            raise CheckpointError(
                f"The checkpoint {path} could not be saved: {failure.words()}. {reason} What was written of it is "
                f"removed, earlier checkpoints are as they were. {room}With strategy.on_save_error=continue a run goes "
                f"on without."
            ) from None


def _prepare(path: Path, needed: int, stack: ExitStack) -> Path:
    """Rank 0: lock the name, clear what dead writers left, look at the room; returns the temporary folder."""
    if path.is_file():
        raise CheckpointError(
            f"The checkpoint folder {path} cannot be made: a file of that name exists. Choose another name, or move "
            f"the file away."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    stack.enter_context(hold(path, "saving", waiting=patience(path, "saving")))
    clear_leftovers(path.parent, mine=path.name)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise CheckpointError(
            f"The checkpoint {path} could not be saved: it needs {size_in_words(needed)}, and {size_in_words(free)} "
            f"are free. Nothing was written, earlier checkpoints are as they were. Make room, or save to another "
            f"folder; with strategy.on_save_error=continue a run goes on without."
        )
    partial = beside(path, PARTIAL)
    partial.mkdir()
    return partial


def _give_up(path: Path, partial: Path | None) -> int:
    """Rank 0: remove what was written; returns the bytes that were free before that."""
    try:
        free = shutil.disk_usage(path.parent).free
        if partial is not None:
            delete(partial)
        return free
    except OSError:
        return 0


def clear_leftovers(folder: Path, *, mine: str = "") -> None:
    """Remove what dead writers left in a folder; a checkpoint that one of them had moved aside goes back.

    mine: name of a checkpoint whose lock this process holds.
    """
    for left, name, kind in left_beside(folder):
        if name != mine and holder_of(folder / name) is not None:
            continue
        if kind == PREVIOUS and not os.path.lexists(folder / name):
            os.rename(left, folder / name)
        elif kind != PREVIOUS or reader_of(folder / name) is None:
            delete(left)
    for lock in folder.glob(".*.lock"):
        name = lock.name.removeprefix(".").removesuffix(".lock")
        if name != mine and lock == lock_file(folder / name) and holder_of(folder / name) is None:
            lock.unlink(missing_ok=True)


def _write_part(
    tensors: dict[str, Any], whole: Mapping[str, bytes], rank_state: bytes, partial: Path, peers: Peers
) -> dict[str, Any] | None:
    """This rank's files; None if only others failed."""
    written = Written()
    try:
        with peers.alone_without_a_warning():
            dcp.save(
                tensors,
                storage_writer=_Writer(partial, written),
                process_group=peers.group,
                no_dist=not peers.together,
            )
    except CheckpointException as error:
        if peers.rank not in error.failures:
            return None
        cause = error.failures[peers.rank][0]
        if not isinstance(cause, Exception):
            raise cause from None
        raise (written.failure or cause) from None
    contents = {rank_file(peers.rank): rank_state, **(whole if peers.is_main else {})}
    for name, content in contents.items():
        with written.open(partial / name) as stream:
            stream.write(content)
    return written.files


def _complete(partial: Path, path: Path, manifest: Manifest, parts: list[dict[str, Any]]) -> None:
    """Rank 0: write the manifest, then give the folder its name."""
    manifest.files = {name: entry for part in parts for name, entry in sorted(part.items())}
    with Written().open(partial / MANIFEST_FILE) as stream:
        stream.write(manifest.as_bytes())
    fsync_folder(partial)
    replace_whole(partial, path, is_read=lambda: reader_of(path) is not None)


class _CheckedFileSystem(FileSystem):
    """torch's file system, writing through `Written`."""

    def __init__(self, written: Written) -> None:
        self._written = written

    @contextmanager
    @override
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase]:
        assert mode == "wb", "a writer reads nothing"
        with self._written.open(Path(path)) as stream:
            yield cast(io.IOBase, stream)

    @override
    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self._written.files[Path(new_path).name] = self._written.files.pop(Path(path).name)


class _Writer(dcp.FileSystemWriter):
    """torch's writer, with checksums, into a folder that exists."""

    def __init__(self, path: Path, written: Written) -> None:
        # `Written` syncs each file itself.
        super().__init__(path, sync_files=False)
        self.fs = _CheckedFileSystem(written)

    @override
    def prepare_local_plan(self, plan: Any) -> Any:
        # Inside one of torch's collectives: a failure before it would leave the other ranks in it.
        if not Path(self.path).is_dir():
            raise FileNotFoundError(
                f"the folder {self.path}, which rank 0 made, does not exist here; all hosts need the same filesystem"
            )
        return plan

    @override
    def storage_meta(self) -> StorageMeta:
        # The temporary path means nothing to a reader.
        return StorageMeta(save_id=self.save_id)
