"""Decide what the end of one rank means for the other ranks of this machine.

Rank 0 supervises the ranks that it started. A thread of its own looks at them ten times a second, because the
main thread may be blocked in a collective; the main thread asks it whose fault an exception was. A run ends
with the traceback of the rank that failed first, within 15 seconds, and leaves no process behind. How a process
is started and heard is `child_process.py`; when a run begins is `launcher.py`.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_npu_tp.devices.fault_text import may_be_lost_peer, reads_like_lost_peer
from lightning_npu_tp.errors import RankFailure
from lightning_npu_tp.launch.child_process import ChildProcess, end_processes, kill_descendants
from lightning_npu_tp.launch.signals import TERMINATED

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
# Reports of one failure reach rank 0 in any order; this long it waits for an earlier one to come in.
SETTLE_SECONDS = 0.5
# What the main thread has to notice that a peer is gone before it is taken to be blocked in C++.
NOTICE_SECONDS = 5.0
# What the main thread has to unwind (callbacks, loggers, teardown) once a peer is dead.
UNWIND_SECONDS = 10.0
# How long an exception of rank 0 that looks like a lost peer waits for the peer's own story.
BLAME_SECONDS = 3.0
# What a rank has after SIGTERM to end by itself.
GRACE_SECONDS = 8.0
# After rank 0's script is through: for a rank that still waits in a trainer call, and for one that winds down.
STUCK_SECONDS = 5.0
FINISH_SECONDS = 60.0


@dataclass(frozen=True)
class Failure:
    """How one rank failed.

    traceback: of the error that ended it; "" if none did.
    is_consequence: the rank only lost the connection to another one, so this is not the cause.
    was_terminated: it was asked to end by SIGTERM.
    output: the end of its stderr, for a failure without a traceback.
    """

    who: str
    time: float
    how: str
    exit_code: int
    traceback: str
    is_consequence: bool
    was_terminated: bool
    output: str = ""

    def report(self) -> str:
        """What the user is told; ends with the rank's own traceback if there is one."""
        if self.traceback:
            return f"{self.who} failed first and {self.how}. Its own traceback:\n\n{self.traceback}"
        hint = " If nobody did that on purpose, look for an out-of-memory kill." if "SIGKILL" in self.how else ""
        told = f" It left no traceback. The end of its stderr:\n\n{self.output}" if self.output else ""
        return f"{self.who} {self.how}.{hint}{told}"


class Supervisor:
    """The other ranks of this machine, from their start until the last one is gone.

    job: which job they were started for; see `launcher.py`.
    grace_seconds: how long a rank has after SIGTERM.
    terminating: whether SIGTERM has reached this process.
    """

    def __init__(self, children: Sequence[ChildProcess], *, job: object) -> None:
        self.children = list(children)
        self.job = job
        self.grace_seconds = GRACE_SECONDS
        self._pid = os.getpid()
        self._calls = 0
        self._raised_calls: set[int] = set()
        self._own_failure: Failure | None = None
        self._blamed: Failure | None = None
        self.terminating = False
        self._finished = threading.Event()
        self._ending = threading.Lock()
        if self.children:
            atexit.register(self._at_exit)
            threading.Thread(target=self._watch, name="supervisor of ranks", daemon=True).start()

    # What the main thread calls

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a trainer call of rank 0, once every rank has begun it.

        Raises RankFailure if another rank is dead, dies meanwhile, or is to blame for what the function raised;
        SIGTERMException(143) if another rank was asked to end by SIGTERM.
        """
        try:
            self._enter()
            return function()
        except BaseException as error:
            self._blame(error)
            raise

    def _enter(self) -> None:
        # The wait is in Python, so a rank that dies while it imports is an exception here; later, inside the key-value
        # store, it could only be the end of the whole process.
        self._calls += 1
        self._own_failure = None
        warned = time.monotonic()
        for child in self.children:
            child.muted = False
        while missing := [child for child in self.children if child.count("enter") < self._calls]:
            if not all(child.is_alive for child in missing):
                time.sleep(SETTLE_SECONDS)
                self._raise_for(self.cause() or self._absent(missing[0]))
            if time.monotonic() - warned > 60:
                warned = time.monotonic()
                names = ", ".join(child.name for child in missing)
                log.warning(f"Still waiting for {names} to reach call {self._calls} of a Trainer in this script.")
            time.sleep(0.02)

    def _blame(self, error: BaseException) -> None:
        """Raise RankFailure if another rank is to blame for this error, without the error, which tells nothing then.

        If it is rank 0's own, the other ranks fall silent, so that its traceback stays the last one.
        """
        if self._blamed is not None:
            return
        self._own_failure = Failure(
            who="Rank 0",
            time=time.monotonic(),
            how="did not finish unwinding",
            exit_code=1,
            traceback="".join(traceback.format_exception(error)).rstrip(),
            is_consequence=may_be_lost_peer(error),
            was_terminated=False,
        )
        if self._own_failure.is_consequence:
            deadline = time.monotonic() + BLAME_SECONDS
            while time.monotonic() < deadline:
                if (cause := self.cause()) is not None and not cause.is_consequence:
                    self._raise_for(cause)
                time.sleep(0.05)
        # Only now: until here what another rank raised in this call was evidence against it.
        self._raised_calls.add(self._calls)
        for child in self.children:
            child.muted = True

    def finish(self) -> Failure | None:
        """Wait for the ranks to end by themselves, end those that cannot; then nothing is watched any more.

        Returns the failure of a rank that failed meanwhile or had to be ended.
        """
        began, late = time.monotonic(), None
        while alive := [child for child in self.children if child.is_alive]:
            waited = time.monotonic() - began
            stuck = next((child for child in alive if child.state == "enter"), None)
            # Once rank 0 has raised or another rank has failed there is nobody left to meet.
            if self._own_failure or self.cause():
                end_processes(alive)
            elif waited > FINISH_SECONDS or (stuck and waited > STUCK_SECONDS):
                what = "was still in a trainer call" if stuck else "still ran"
                late = self._plain_failure(stuck or alive[0], f"{what} when rank 0 had finished its script")
                end_processes(alive)
            time.sleep(0.02)
        self._finished.set()
        atexit.unregister(self._at_exit)
        return None if self._own_failure else self.cause() or late

    def end_run(self, cause: Failure | None, exit_code: int | None = None) -> None:
        """End every rank and then this process, whatever its main thread does. Never returns."""
        self._ending.acquire()
        blocked = threading.current_thread() is not threading.main_thread()
        where = f"Rank 0 is ended; it was at {_where_is_main_thread()}.\n" if blocked else ""
        end_processes(self.children)
        if cause is not None:
            write_to_stderr(where + cause.report())
        end_now(exit_code or (cause.exit_code if cause else 1))

    # What is known

    def cause(self) -> Failure | None:
        """The failure that explains the others best: not a mere loss of connection, and then the first."""
        failures = [failure for child in self.children if (failure := self._failure(child))]
        return min(failures, key=lambda failure: (failure.is_consequence, failure.time), default=None)

    def _failure(self, child: ChildProcess) -> Failure | None:
        if child.ended_by_us:
            return None
        alive, exit_code = child.is_alive, child.exit_code
        raised = child.last("raised") if child.state == "raised" else None
        terminated = child.last("terminated") is not None or exit_code == TERMINATED
        if not exit_code and not terminated:
            # A call that raised in rank 0 as well is rank 0's to report.
            if raised and child.count("enter") not in self._raised_calls:
                exit_code = 1
            elif not alive and (child.state == "enter" or child.count("enter") < self._calls):
                return self._absent(child)
            else:
                return None
        killed = exit_code is not None and exit_code > 128 and raised is None
        # With any other exit code a traceback on its stderr is of an error that somebody has handled.
        text = child.traceback() if raised or exit_code == 1 else ""
        lost_peer = raised["may_be_lost_peer"] if raised else reads_like_lost_peer(_last_error(text))
        if terminated:
            how = "was asked to end by SIGTERM"
        elif raised:
            how = "raised"
        else:
            how = child.describe_end()
        return Failure(
            who=_who(child),
            time=raised["time"] if raised else child.dead_since or time.monotonic(),
            how=how,
            exit_code=TERMINATED if terminated else exit_code or 1,
            traceback="" if killed or terminated else text,
            is_consequence=not killed and not terminated and lost_peer,
            was_terminated=terminated,
            output="" if killed or terminated else child.tail(),
        )

    def _absent(self, child: ChildProcess) -> Failure:
        how = f"{child.describe_end()} during or before call {self._calls} of a Trainer in this script"
        return self._plain_failure(child, how)

    def _plain_failure(self, child: ChildProcess, how: str) -> Failure:
        return Failure(
            who=_who(child),
            time=child.dead_since or time.monotonic(),
            how=f"{how}; every rank has to make the same calls",
            exit_code=1,
            traceback="",
            is_consequence=False,
            was_terminated=False,
        )

    # What happens beside the main thread

    def _raise_for(self, cause: Failure) -> NoReturn:
        self._blamed = cause
        self._own_failure = self._own_failure or cause
        end_processes(self.children)
        if cause.was_terminated:
            write_to_stderr(f"{cause.who} {cause.how}; this ends the run.")
            raise SIGTERMException(TERMINATED) from None
        raise RankFailure(cause.report()) from None

    def _watch(self) -> None:
        since: float | None = None
        while not self._finished.wait(POLL_SECONDS):
            cause = self.cause()
            if cause is None and self._own_failure is None:
                since = None
                continue
            since = since or time.monotonic()
            waited = time.monotonic() - since
            if cause is not None and cause.was_terminated:
                self._pass_sigterm_on(cause, waited)
            elif self._own_failure is None:
                if cause is not None and waited > NOTICE_SECONDS:
                    self.end_run(cause)
            elif waited > NOTICE_SECONDS:
                self._clear_up(cause, waited)

    def _pass_sigterm_on(self, cause: Failure, waited: float) -> None:
        """SIGTERM to another rank is SIGTERM to this one."""
        handled = callable(signal.getsignal(signal.SIGTERM))
        if handled and not self.terminating and self._own_failure is None:
            self.terminating = True
            write_to_stderr(f"{cause.who} {cause.how}; this ends the run.")
            os.kill(self._pid, signal.SIGTERM)
        elif (not handled and self._own_failure is None) or waited > self.grace_seconds:
            self.end_run(cause)

    def _clear_up(self, cause: Failure | None, waited: float) -> None:
        """Rank 0 is unwinding: end the ranks that cannot meet it any more, and rank 0 if it hangs on the way."""
        end_processes([child for child in self.children if child.is_alive and child.state != "raised"])
        someone_is_gone = any(not child.is_alive for child in self.children)
        if someone_is_gone and waited > UNWIND_SECONDS and _main_thread_is_in_trainer_call():
            self.end_run(self._blamed or self._own_failure or cause)

    def _at_exit(self) -> None:
        # A forked process that leaves through the interpreter's normal exit gets here as well.
        if os.getpid() != self._pid:
            return
        # last_value is set by the interpreter when it has printed an uncaught exception.
        printed = hasattr(sys, "last_value")
        if printed or self._own_failure:
            for child in self.children:
                child.muted = True
            end_processes(self.children)
        cause = self.finish()
        if cause and not printed:
            self.end_run(cause)
        elif self._blamed and not self._blamed.was_terminated and not printed:
            # Somebody else printed the error, Hydra for one, and added lines of his own after the traceback.
            write_to_stderr(self._blamed.report())


def end_now(exit_code: int) -> NoReturn:
    """End this process without the interpreter's clean-up, but with what its streams have buffered."""
    # In a thread: the main thread may hold a stream's lock for ever.
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(1.0)
    kill_descendants()
    os._exit(exit_code)


def write_to_stderr(text: str) -> None:
    """Write to stderr from any thread, past whatever replaced sys.stderr."""
    os.write(2, f"\n{text}\n".encode())


def _flush() -> None:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()


def _who(child: ChildProcess) -> str:
    return f"{child.name.capitalize()} (process {child.process.pid})"


def _last_error(text: str) -> str:
    """The part of a traceback that is no stack: from the first unindented line after the last frame."""
    lines = text.splitlines()
    frames = [i for i, line in enumerate(lines) if line.startswith("  ")]
    return "\n".join(lines[frames[-1] + 1 :]) if frames else text


def _main_thread_frames() -> list[FrameType]:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _main_thread_is_in_trainer_call() -> bool:
    """Whether the main thread is still inside Lightning's fit, validate, test or predict.

    Not to be confused with having left it and caught the error there, as a sweep does: that process lives on.
    """
    return any(frame.f_code.co_name == "_call_and_handle_interrupt" for frame in _main_thread_frames())


def _where_is_main_thread() -> str:
    frames = _main_thread_frames()
    if not frames:
        return "its end"
    return f"{frames[0].f_code.co_filename}:{frames[0].f_lineno} in {frames[0].f_code.co_name}"
