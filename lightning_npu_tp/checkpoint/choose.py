"""Which checkpoint `ckpt_path="auto" | "last" | "best"` means: the newest that is complete and undamaged.

Lightning resolves "last" and "best" to a path by name and time and cannot tell whether it is whole; "auto" is this
package's. A path given by name is never replaced by another one. How a checkpoint is read is `reader.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_npu_tp.checkpoint.files import in_place
from lightning_npu_tp.checkpoint.manifest import age_key, newest_complete, problem
from lightning_npu_tp.errors import CheckpointError

AUTO, LAST, BEST = "auto", "last", "best"


class NoCheckpoint(dict[str, Any]):
    """What "auto" loads where there is no checkpoint: false even when Lightning has written its version into it."""

    def __bool__(self) -> bool:
        return False


def asked_for(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """What a trainer call was given as `ckpt_path`, before Lightning makes a path of auto, last or best; None for none.

    function, args, kwargs: what the launcher runs.
    """
    try:
        value = inspect.signature(function).bind(*args, **kwargs).arguments.get("ckpt_path")
    except (TypeError, ValueError):
        return None
    return None if value is None else str(value)


def choose(trainer: Trainer, word: str, path: Path, *, checksums: bool) -> Path | None:
    """The checkpoint to load; None where "auto" finds none and the run starts anew. For one rank to call.

    word:      auto, last or best.
    path:      what Lightning made of last or best; it is taken if it is good.
    checksums: compare them, not only sizes; reads the checkpoint.

    Warns of each newer checkpoint that is skipped. Raises CheckpointError if none is left for last or best,
    also for auto without a ModelCheckpoint.
    """
    if word == AUTO:
        return newest_in(checkpoint_folders(trainer), checksums=checksums)
    # ModelCheckpoint's save_last="link" is a link; its target is looked at and named.
    target = in_place(path).resolve()
    if not (reason := problem(target, checksums=checksums)):
        return path
    _skip(target, reason)
    found = newest_in([path.parent], checksums=checksums, known_bad=target)
    if found is None:
        raise CheckpointError(
            f'ckpt_path="{word}" is {path}, which cannot be used, and {path.parent} holds no other complete '
            f"checkpoint: {reason}"
        )
    rank_zero_warn(f'ckpt_path="{word}": going on from {found} instead.')
    return found


def folders_of(trainer: Trainer) -> list[Path]:
    """The folders into which the trainer's ModelCheckpoint callbacks save."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return sorted({Path(callback.dirpath).absolute() for callback in callbacks if callback.dirpath is not None})


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """The folders into which the trainer's ModelCheckpoint callbacks save. Raises CheckpointError if there is none."""
    folders = folders_of(trainer)
    if not folders:
        raise CheckpointError(
            'ckpt_path="auto" looks where ModelCheckpoint saves, and the Trainer has no ModelCheckpoint with a folder. '
            "Add ModelCheckpoint(dirpath=…), or give the checkpoint's path."
        )
    return folders


def newest_in(folders: Sequence[Path], *, checksums: bool, known_bad: Path | None = None) -> Path | None:
    """The newest complete checkpoint of several folders; warns of every newer one that is skipped.

    known_bad: has been told of already.
    """

    def skipped(path: Path, reason: str) -> None:
        if path.resolve() != known_bad:
            _skip(path, reason)

    found = [newest_complete(folder, skipped=skipped, checksums=checksums) for folder in folders]
    return max((path for path in found if path is not None), key=age_key, default=None)


def _skip(path: Path, reason: str) -> None:
    rank_zero_warn(f"The checkpoint {path} is skipped: {reason}")
