"""The steps of a teardown: all are tried, and none hides why the run failed.

A device that has failed refuses every call after, so that moving weights back or closing a group on it raises again;
Python would then show that error as the last one, and not the explained one before it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable


def close_all(steps: Iterable[Callable[[], object]], *, failing: bool) -> None:
    """Run every step, also after one that raised.

    failing: another error is on its way out already; what the steps raise is then a warning. Otherwise the first of
        their errors is raised once all have been tried.
    """
    first: Exception | None = None
    for step in steps:
        try:
            step()
        except Exception as error:
            if failing:
                line = next(iter(str(error).splitlines()), "")
                warnings.warn(f"While the failed run was closed: {type(error).__name__}: {line}", stacklevel=2)
            elif first is None:
                first = error
    if first is not None:
        raise first
