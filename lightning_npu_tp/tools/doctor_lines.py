"""Lines of a diagnosis, and asking another program within a time limit; shared by the doctor's parts."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Line:
    """One thing looked at: what was found and, unless it is ok, what to do."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def ok(name: str, detail: str) -> Line:
    """A line of what is as it should be."""
    return Line(name, "ok", detail)


def warn(name: str, detail: str, fix: str) -> Line:
    """A line of what some runs may suffer from."""
    return Line(name, "warn", detail, fix)


def fail(name: str, detail: str, fix: str) -> Line:
    """A line of what will make runs fail."""
    return Line(name, "fail", detail, fix)


@dataclass(frozen=True)
class Said:
    """What a program printed; output is None if it failed, and `problem` says how."""

    output: str | None
    problem: str = ""


def answer_of(command: Sequence[str], seconds: float, environ: Mapping[str, str]) -> Said:
    """Run a program and take what it prints; never raises and never waits longer than `seconds`."""
    try:
        done = subprocess.run(
            command, env=dict(environ), capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return Said(None, f"{command[0]} did not answer within {seconds:g} s")
    except OSError as error:
        return Said(None, f"{command[0]} cannot be started: {error}")
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return Said(None, f"{command[0]} failed: {last}")
    return Said(done.stdout)
