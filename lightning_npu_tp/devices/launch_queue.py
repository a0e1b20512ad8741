"""Watch that work still reaches the card, because torch_npu can stop handing it over without a word.

torch_npu puts copies, events, collectives and operators into a queue that a thread of its own works off. If a call
fails there, what is queued is dropped, the thread ends, and the next call that comes to the queue gets the error, once.
That can be a thread that throws it away (an event that the watchdog of HCCL destroys): then all that is handed over
later is dropped in silence, and training goes on over numbers that no card computed. Or work that was queued in the
same moment lies there for ever, and so does whoever waits for it. So a thread of ours looks whether that thread still
lives, and sends an event through the queue now and then. Where the queue answers with an error, or drops the event,
that is raised in the trainer's thread; if that one hangs, the process ends. Before a checkpoint is kept the same is
asked in the trainer's thread.

Source: torch_npu/csrc/core/npu/NPUQueue.cpp and NPUEvent.cpp of torch_npu 2.13; seen with the released wheel on the
simulated Ascend.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from lightning_npu_tp.devices.device import torch_module
from lightning_npu_tp.devices.process_log import logged_errors, place_of_logs

# What torch_npu calls the queue's thread; and the folder of this process's threads, under Linux.
_NAME = "acl_thread"
_THREADS = Path("/proc/self/task")
_POLL_SECONDS = 0.05
_PROBE_SECONDS = 1.0
# In which the thread is looked for often: it starts with the first work.
_SEARCH_SECONDS = 5.0
# Until an event that was not recorded yet is looked into: the queue may have much to do.
_PATIENCE_SECONDS = 2.0
# Until the trainer's thread has noticed an exception, if it runs Python at all.
_NOTICE_SECONDS = 5.0
# Until a process whose queue has ended is through with its clean-up; if it cannot even say that, a little more.
_UNWIND_SECONDS = 20.0
_SPEECHLESS_SECONDS = 5.0

_watch: LaunchQueueWatch | None = None


class LaunchQueueEnded(RuntimeError):
    """torch_npu hands nothing to the card any more; `text` says why, as far as it is known."""

    text = ""

    @override
    def __str__(self) -> str:
        return self.text


class LaunchQueueWatch:
    """Looks after the launch queue of this process from `start` to `close`; made in the trainer's thread.

    device: the NPU that this process uses.
    end:    called in a helper thread with the error if the trainer's thread does not notice it, or hangs after it has;
        must end the process.
    """

    def __init__(self, device: torch.device, end: Callable[[BaseException], None]) -> None:
        self._device, self._end = device, end
        self._closed = threading.Event()
        self._caller = threading.get_ident()
        self._queue: Path | None = None
        self.unwinding_error: BaseException | None = None
        self._thread = threading.Thread(target=self._look, name="launch queue watch", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Stop; an error that is on its way is left to whoever closes."""
        self._closed.set()
        # Not while it is in the middle of a call; but it may wait for a queue that hangs.
        self._thread.join(_PROBE_SECONDS)

    def _look(self) -> None:
        module: Any = torch_module(self._device.type)
        try:
            module.set_device(self._device)
            stream = module.Stream(self._device)
        except RuntimeError:
            # The trainer's thread meets it as well.
            return
        begun, due = time.monotonic(), 0.0
        # Often, to come before a thread that would throw the error away.
        while not self._closed.wait(_POLL_SECONDS):
            now = time.monotonic()
            # In launch-blocking mode there is none to be found.
            if self._queue is None and (now >= due or now < begun + _SEARCH_SECONDS):
                self._queue = _queue_thread()
            if now < due and not self.has_ended():
                continue
            if text := self._problem(module, stream):
                self._tell(text)
                return
            due = time.monotonic() + _PROBE_SECONDS

    def has_ended(self) -> bool:
        """Whether the queue's thread has ended; it has no other reason than a failure while the watch looks."""
        return self._queue is not None and not self._queue.exists()

    def _problem(self, module: Any, stream: Any) -> str:
        """What is wrong with the queue; "" for nothing. Waits for nothing but, in doubt, the queue itself."""
        event = module.Event()
        try:
            event.record(stream)
        except RuntimeError as error:
            # Nobody else will get it now.
            return str(error)
        try:
            for _ in range(int(_PATIENCE_SECONDS / _POLL_SECONDS)):
                if event.query() or self._closed.wait(_POLL_SECONDS):
                    return ""
            # Where its thread has ended, the queue's remaining work may never end; nor would waiting for it.
            lost = self.has_ended() or not _is_recorded(event, stream)
            return dropped(os.getpid()) if lost else ""
        except RuntimeError:
            # The card's, which everybody is told who waits for it.
            return ""

    def _tell(self, text: str) -> None:
        # A class of its own: what Python raises in another thread it makes there, without arguments.
        ended = type(LaunchQueueEnded.__name__, (LaunchQueueEnded,), {"text": text})
        if self.unwinding_error is None and not self._closed.is_set():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._caller), ctypes.py_object(ended))
            self._closed.wait(_NOTICE_SECONDS)
        if self.unwinding_error is not None:
            self._closed.wait(_UNWIND_SECONDS)
        if not self._closed.is_set():
            self._end(self.unwinding_error or ended())


def watch_launch_queue(device: torch.device, end: Callable[[BaseException], None]) -> None:
    """Begin to look after this process's launch queue; instead of the watch before."""
    global _watch
    unwatch_launch_queue()
    _watch = LaunchQueueWatch(device, end)
    _watch.start()


def expect_unwinding(error: BaseException) -> None:
    """The trainer's thread has this error and is on its way out, where it can still come to hang."""
    if _watch is not None:
        _watch.unwinding_error = error
        if _watch.has_ended():
            _end_if_it_hangs()


def launch_queue_has_ended() -> bool:
    """Whether whatever waits for the card now may wait for ever."""
    return _watch is not None and _watch.has_ended()


def unwatch_launch_queue() -> None:
    """Undo `watch_launch_queue`: nothing will be handed over any more."""
    global _watch
    if _watch is None:
        return
    if _watch.has_ended():
        faulthandler.cancel_dump_traceback_later()
        # torch_npu waits for the card when the interpreter ends.
        atexit.register(_end_if_it_hangs)
    _watch.close()
    _watch = None


def _end_if_it_hangs() -> None:
    # Not by a thread of Python: some of torch_npu's calls wait for the queue with the interpreter's lock in hand.
    faulthandler.dump_traceback_later(_UNWIND_SECONDS + _SPEECHLESS_SECONDS, exit=True)


def require_launch_queue(device: torch.device) -> None:
    """Raise if what was handed over so far has not all reached the card; waits for it.

    Raises LaunchQueueEnded, or what torch_npu says itself.
    """
    module: Any = torch_module(device.type)
    event, stream = module.Event(), module.current_stream(device)
    event.record(stream)
    if not _is_recorded(event, stream):
        error = LaunchQueueEnded()
        error.text = dropped(os.getpid())
        raise error


def _is_recorded(event: Any, stream: Any) -> bool:
    # Waiting for the event itself would never end where its record was dropped; the stream's waits for the queue.
    stream.synchronize()
    return bool(event.query())


def _queue_thread() -> Path | None:
    found = []
    for thread in _THREADS.iterdir() if _THREADS.is_dir() else ():
        # One that has ended meanwhile was none.
        with contextlib.suppress(OSError):
            if (thread / "comm").read_text().strip() == _NAME:
                found.append(thread)
    # Threads that it starts inherit the name, and may end as they like.
    return min(found, key=lambda thread: int(thread.name), default=None)


def dropped(pid: int) -> str:
    """What to say where the queue's error was lost: the end of that process's log, if there is one."""
    text = (
        "torch_npu's launch queue has ended, and a thread of torch_npu has swallowed its error. Nothing that this "
        "process calls reaches the card any more."
    )
    if logged := logged_errors(pid):
        return f"{text} {logged}"
    return f"{text} The device's log would be {place_of_logs(pid)}, but is not there."
