"""The saves of a run: at most one in flight, failures that stop the run or are told loudly, removals that wait.

A removal asked for while a save is in flight waits for it, and one after a failed save is not done: the checkpoint
stands in for the one that failed, and goes when that one would have gone. So a good checkpoint is never deleted for
one that does not exist.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_npu_tp.checkpoint.files import remove_whole
from lightning_npu_tp.checkpoint.locks import holder_of, reader_of
from lightning_npu_tp.errors import CheckpointError


class Saves:
    """Runs saves and removals of one rank in order; every rank has one and calls it alike.

    stop: a failed save raises CheckpointError; otherwise it is warned of and told again by `report`.
    """

    def __init__(self, *, stop: bool) -> None:
        self._stop = stop
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._running = False
        self._error: BaseException | None = None
        self._path = Path()
        self._failed: Path | None = None
        self._waiting: list[Path] = []
        self._stand_ins: dict[Path, list[Path]] = {}
        self._notes: list[str] = []
        self._total = 0
        self.failures: list[tuple[Path, str]] = []

    def run(self, path: Path, save: Callable[[], None], *, background: bool) -> None:
        """Save now, or start to; a save in flight is waited for first."""
        self.wait()
        self._path, self._running = path, True
        self._total += 1
        if background:
            self._thread = threading.Thread(target=self._work, args=(save,), name="checkpoint save", daemon=True)
            self._thread.start()
        else:
            self._work(save)
            self._settle()

    def wait(self) -> None:
        """Wait for the save in flight. Raises its CheckpointError, or warns, as the setting says."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._settle()

    def remove(self, path: Path) -> None:
        """Remove a checkpoint, once it is sure that the newer one is good; rank 0 calls it."""
        with self._lock:
            if self._running:
                self._waiting.append(path)
                return
            self._remove(path)
        self._tell_notes()

    def report(self) -> None:
        """At the end of a run: say again which saves failed."""
        if self.failures:
            told = "; ".join(
                f"{path} ({text.removeprefix(f'The checkpoint {path} could not be saved: ')})"
                for path, text in self.failures
            )
            rank_zero_warn(f"{len(self.failures)} of {self._total} checkpoints of this run were not saved: {told}")
        self.failures, self._total = [], 0

    def _work(self, save: Callable[[], None]) -> None:
        error: BaseException | None = None
        try:
            save()
        except BaseException as problem:
            error = problem
        with self._lock:
            self._error = error
            self._failed = None if error is None else self._path
            waiting, self._waiting = self._waiting, []
            for path in waiting:
                self._remove(path)
            self._running = False

    def _settle(self) -> None:
        """In the main thread, where a warning reaches the user: look at how the save ended."""
        error, self._error = self._error, None
        self._tell_notes()
        if error is None:
            return
        if not isinstance(error, CheckpointError):
            raise error
        self.failures.append((self._path, str(error)))
        if self._stop:
            raise error
        rank_zero_warn(f"The run goes on without a checkpoint (strategy.on_save_error=continue). {error}")

    def _tell_notes(self) -> None:
        notes, self._notes = self._notes, []
        for note in notes:
            rank_zero_warn(note)

    def _remove(self, path: Path) -> None:
        doomed = [*self._stand_ins.pop(path, []), path]
        if self._failed is not None:
            kept = [one for one in doomed if os.path.lexists(one)]
            self._stand_ins.setdefault(self._failed, []).extend(kept)
            self._notes += [f"{one} is kept, because {self._failed} could not be saved." for one in kept]
            return
        for one in doomed:
            if (holder := holder_of(one) or reader_of(one)) is not None:
                self._notes.append(f"{one} is kept: process {holder.pid} of {holder.host} is {holder.purpose} it.")
                continue
            try:
                remove_whole(one)
            except OSError as error:
                self._notes.append(f"The checkpoint {one} could not be removed: {error.strerror}.")
