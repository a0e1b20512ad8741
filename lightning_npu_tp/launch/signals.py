"""End this rank on SIGTERM or Ctrl-C even while its main thread is blocked in C++.

Python runs signal handlers in the main thread between bytecodes, so a rank that waits in a collective never
runs one; and Lightning's own SIGTERM handler enters a collective, which hangs unless all ranks were signalled.
Here the handler only raises, and a thread that the interpreter's wake-up descriptor notifies counts down
beside it. What else a signal means (tell the parent, pass it to the children) is the caller's, as callbacks.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from lightning.pytorch.utilities.exceptions import SIGTERMException

TERMINATED = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT
_STOP = b"\0"

_in_force: SignalWatch | None = None
_fork_hook_registered = False
_before_fork = threading.local()


class SignalWatch:
    """SIGTERM and Ctrl-C of one rank, in force from `install` to `close`.

    on_sigterm: runs in the main thread between bytecodes. None raises SIGTERMException(143): callbacks and
        loggers still finish, and 143 becomes the exit code.
    grace_seconds: how long the main thread has after SIGTERM to end the process, and after Ctrl-C to notice it.
    notice: runs once in a helper thread as soon as SIGTERM arrives, whatever the main thread does.
    end: ends the process with that exit code; called in a helper thread once the grace is over.
    """

    def __init__(
        self,
        *,
        on_sigterm: Callable[[], None] | None,
        grace_seconds: float,
        notice: Callable[[], None],
        end: Callable[[int], None],
    ) -> None:
        self._on_sigterm = on_sigterm
        self._grace_seconds = grace_seconds
        self._notice = notice
        self._end = end
        self._counting: set[int] = set()
        self._delivered: set[int] = set()
        self._replaced: dict[int, object] = {}
        self._write_fd = self._previous_fd = -1

    def install(self) -> None:
        """Take the signals over from whoever has them now. Does nothing outside the main thread."""
        global _in_force
        if threading.current_thread() is not threading.main_thread() or self._write_fd >= 0:
            return
        _register_fork_hook()
        read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        threading.Thread(target=self._listen, args=(read_fd,), name="signal watch", daemon=True).start()
        self._previous_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._replaced[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._on_sigterm_delivered)
        # A script that ignores or handles Ctrl-C in its own way keeps doing so.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._replaced[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_sigint_delivered)
        _in_force = self

    def close(self, *, unwinding: bool) -> None:
        """Give the signals back to the handlers of before; a countdown that has begun goes on.

        unwinding: the trainer call raised, and Lightning is about to restore the handlers itself. The SIGTERM handler
            stays until then, because the one that it replaced is Lightning's, which would enter a collective.
        """
        global _in_force
        if self._write_fd < 0:
            return
        signal.set_wakeup_fd(self._previous_fd)
        ours = (self._on_sigterm_delivered, self._on_sigint_delivered)
        for signum, handler in self._replaced.items():
            keeps = unwinding and signum == signal.SIGTERM
            # Lightning has put its predecessors back when a trainer call ended well; that must stand.
            if signal.getsignal(signum) in ours and not keeps:
                signal.signal(signum, handler)  # type: ignore[arg-type]
        os.write(self._write_fd, _STOP)
        os.close(self._write_fd)
        self._write_fd = -1
        _in_force = None

    def _on_sigterm_delivered(self, signum: int, frame: FrameType | None) -> None:
        self._count_down(signum)
        # The second of two signals must not interrupt the clean-up that the first one started.
        if signum in self._delivered:
            return
        self._delivered.add(signum)
        if self._on_sigterm is None:
            raise SIGTERMException(TERMINATED)
        self._on_sigterm()

    def _on_sigint_delivered(self, signum: int, frame: FrameType | None) -> None:
        self._delivered.add(signum)
        signal.default_int_handler(signum, frame)

    def _listen(self, read_fd: int) -> None:
        with open(read_fd, "rb", buffering=0) as pipe:
            while (received := pipe.read(1)) not in (b"", _STOP):
                if received[0] in self._replaced:
                    self._count_down(received[0])

    def _count_down(self, signum: int) -> None:
        # Called by the handler as well, because a closed watch has no listener any more. No lock: the handler may have
        # interrupted its holder, and a countdown started twice does no harm.
        if signum in self._counting:
            return
        self._counting.add(signum)
        work = self._after_sigterm if signum == signal.SIGTERM else self._after_sigint
        threading.Thread(target=work, name="signal countdown", daemon=True).start()

    def _after_sigterm(self) -> None:
        try:
            self._notice()
        finally:
            time.sleep(self._grace_seconds)
            self._end(TERMINATED)

    def _after_sigint(self) -> None:
        time.sleep(self._grace_seconds)
        if signal.SIGINT not in self._delivered:
            self._end(INTERRUPTED)


def _register_fork_hook() -> None:
    """Let no forked process write into this rank's wake-up pipe.

    `multiprocessing` ends its forked workers with SIGTERM; with the inherited handler and descriptor that would look
    like a SIGTERM to this rank. The signals are held back around the fork, because one may come before the hook.
    """
    global _fork_hook_registered
    if not _fork_hook_registered:
        os.register_at_fork(
            before=_hold_signals, after_in_parent=_release_signals, after_in_child=_release_signals_in_child
        )
        _fork_hook_registered = True


def _hold_signals() -> None:
    _before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})


def _release_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _before_fork.mask)


def _release_signals_in_child() -> None:
    if _in_force is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _release_signals()
