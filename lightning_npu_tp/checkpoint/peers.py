"""The ranks that save or load a checkpoint together: each does its part, and a failure of one is everybody's.

Without a process group one process is all there is. A group of one's own lets a background thread save while the main
thread trains.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_npu_tp.errors import CheckpointError

T = TypeVar("T")


class PeerFailure(Exception):
    """A part failed on some ranks. failures: rank -> what was raised there, as text."""

    def __init__(self, failures: dict[int, str]) -> None:
        self.failures = failures
        super().__init__(self.words())

    def words(self) -> str:
        """Every failure once, with the ranks that saw it."""
        by_text: dict[str, list[int]] = {}
        for rank, text in self.failures.items():
            by_text.setdefault(text, []).append(rank)
        return "; ".join(
            f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {text}"
            for text, ranks in by_text.items()
        )


@dataclass(frozen=True)
class Peers:
    """All ranks of a process group; None is the default group, or this process alone if there is none."""

    group: dist.ProcessGroup | None = None

    @property
    def together(self) -> bool:
        """Whether there is a process group."""
        return self.group is not None or dist.is_initialized()

    @property
    def rank(self) -> int:
        """This process's rank in the group; 0 without one."""
        return dist.get_rank(self.group) if self.together else 0

    @property
    def world(self) -> int:
        """Number of ranks in the group; 1 without one."""
        return dist.get_world_size(self.group) if self.together else 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which does what is done once."""
        return self.rank == 0

    @contextmanager
    def alone_without_a_warning(self) -> Iterator[None]:
        """Around torch's checkpoint functions, which warn a process that has no process group."""
        if self.together:
            # Filters belong to the whole process, and this may be a thread.
            yield
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in the order of ranks, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def each(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank and return everybody's result.

        If it failed on any rank, all raise: CheckpointError with its text if that is what it was, else PeerFailure.
        """
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = work()
        except BaseException as error:
            failure = error
        told = failure if failure is None else _in_words(failure)
        outcomes = self.gather((told, isinstance(failure, CheckpointError), result))
        if failure is not None and not isinstance(failure, Exception):
            # A signal asked this rank to end: the others know now.
            raise failure
        failures = {rank: text for rank, (text, _, _) in enumerate(outcomes) if text is not None}
        if failures and all(outcomes[rank][1] for rank in failures):
            raise CheckpointError(" ".join(dict.fromkeys(failures.values())))
        if failures:
            raise PeerFailure(failures)
        return [value for _, _, value in outcomes]  # type: ignore[misc]

    def main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its result on every rank; PeerFailure on all if it failed."""
        return self.each(lambda: work() if self.is_main else None)[0]  # type: ignore[return-value]


def _in_words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
