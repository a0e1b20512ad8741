"""The frames that a caught error came through, for those who explain errors from what was at work."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType, TracebackType


def frames_of(traceback: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    """Each frame with its line, outermost first; not the first of a traceback, which handles the error.

    Looking at the variables of that one would let it hold the error, and all that the error holds, for good.
    """
    while traceback is not None and (traceback := traceback.tb_next) is not None:
        yield traceback.tb_frame, traceback.tb_lineno
