"""One process at a time writes a checkpoint, a cache, a download: `.NAME.lock` beside it says host, process, purpose.

Readers stop nobody: each has a `.NAME.reading-….lock` of its own, and what it reads is not deleted meanwhile, also when
a writer gives the name to another checkpoint.

A lock whose process is gone is stale and taken over. Of another host's process only signs of life can be seen: the
holder touches the file every few seconds, and a lock that was not touched for STALE_AFTER_S is stale as well, so that
a job that was killed on one host and goes on at another does not wait for ever.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from lightning_npu_tp.checkpoint.files import PREVIOUS, delete
from lightning_npu_tp.errors import CheckpointError, LightningNPUTPError

_READING = "reading-"
# At a lock without content, 0.01 s each.
_LOOKS = 50
TOUCH_EVERY_S = 10.0
STALE_AFTER_S = 120.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. started: of the process, seconds since the epoch: process numbers are used again."""

    host: str
    pid: int
    started: float
    purpose: str

    @classmethod
    def me(cls, purpose: str) -> Holder:
        """This process as a holder."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time(), purpose)

    def alive(self, silent_s: float) -> bool:
        """Whether the holder can still be at work. silent_s: seconds since its last sign of life."""
        if self.host != socket.gethostname():
            return silent_s < STALE_AFTER_S
        try:
            # A boot in between changes the clock that the start is counted from by less than a second.
            return abs(psutil.Process(self.pid).create_time() - self.started) < 2.0
        except psutil.NoSuchProcess:
            return False


def lock_file(path: Path) -> Path:
    """Where the lock of the checkpoint, cache or download `path` lies."""
    return path.with_name(f".{path.name}.lock")


def holder_of(path: Path) -> Holder | None:
    """The live process that holds the checkpoint, cache or download `path`, if any."""
    file = lock_file(path)
    try:
        holder = _holder_in(file)
    except FileNotFoundError:
        return None
    try:
        silent_s = _now(file.parent) - file.stat().st_mtime
    except FileNotFoundError:
        return None
    return holder if holder.alive(silent_s) else None


def _holder_in(file: Path) -> Holder:
    """Who a lock names. Raises FileNotFoundError where there is none."""
    for _ in range(_LOOKS):
        try:
            holder = Holder(**json.loads(file.read_text()))
        except (ValueError, TypeError):
            # Its owner has just made it and is about to write into it.
            time.sleep(0.01)
            continue
        if isinstance(holder.pid, int) and isinstance(holder.started, int | float) and holder.pid > 0:
            return holder
        break
    # Cut off while it was written, or of another program: it counts for as long as it is fresh.
    return Holder("unknown", 0, 0.0, "working")


def reader_of(path: Path) -> Holder | None:
    """A live process that reads the checkpoint `path`, if any does."""
    for file in path.parent.glob(f".{glob.escape(path.name)}.{_READING}*.lock"):
        if (holder := holder_of(path.with_name(file.name[1 : -len(".lock")]))) is not None:
            return holder
    return None


@contextmanager
def reading(path: Path) -> Iterator[Path]:
    """Read a checkpoint that may be replaced or removed meanwhile: yields a path at which it stays to the end.

    Errors of this package say the checkpoint's own path. Where its folder cannot be written there is no lock, and a
    checkpoint that is removed is an error of whoever reads it.
    """
    with ExitStack() as stack:
        if os.access(path.parent, os.W_OK) and path.exists():
            stack.enter_context(hold(path, "reading"))
        try:
            # A name leads to another checkpoint once it is replaced, an open folder does not.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            yield path
            return
        stack.callback(os.close, descriptor)
        pinned = Path(f"/proc/self/fd/{descriptor}")
        if not pinned.exists():
            yield path
            return
        try:
            yield pinned
        except LightningNPUTPError as error:
            raise type(error)(str(error).replace(str(pinned), str(path))) from error


def patience(path: Path, purpose: str) -> Callable[[Holder], None]:
    """For `hold(waiting=…)`: waits for a process of another host until its lock must have expired, then refuses.

    A process of this host is seen to live: it is refused at once.
    """
    begun = time.monotonic()
    told = False

    def wait(holder: Holder) -> None:
        nonlocal told
        if holder.host == socket.gethostname() or time.monotonic() - begun > STALE_AFTER_S + 2 * TOUCH_EVERY_S:
            raise CheckpointError(_in_use(path, lock_file(path), holder, purpose))
        if not told:
            told = True
            print(
                f"{path}: process {holder.pid} of {holder.host} is {holder.purpose} it, or was ended there. Waiting "
                f"{STALE_AFTER_S:.0f} s for a sign of life.",
                file=sys.stderr,
                flush=True,
            )

    return wait


@contextmanager
def hold(path: Path, purpose: str, *, waiting: Callable[[Holder], object] | None = None) -> Iterator[None]:
    """Hold the checkpoint or cache `path` (it need not exist yet) against others that write or remove it.

    purpose: "saving", "reading", "building", "downloading" or "training". Of a link, a reader holds the target, a
             writer the link, which it replaces. Readers hold it against removal alone, any number at once.
    waiting: is called again and again while another live process holds it; None does not wait.
    Raises CheckpointError naming host and process if a live one holds it, unless it waits.
    """
    if purpose == "reading":
        target = path.resolve()
        path = target.with_name(f"{target.name}.{_READING}{uuid.uuid4().hex[:12]}")
    file = lock_file(path)
    content = json.dumps(asdict(Holder.me(purpose)))
    while (holder := _take(file, content, path)) is not None:
        if waiting is None:
            raise CheckpointError(_in_use(path, file, holder, purpose))
        waiting(holder)
        time.sleep(0.2)
    done = threading.Event()
    touching = threading.Thread(target=_keep_touching, args=(file, done), name="checkpoint lock", daemon=True)
    touching.start()
    try:
        yield
    finally:
        done.set()
        touching.join()
        file.unlink(missing_ok=True)
        if purpose == "reading":
            _clear_replaced(target)


def _clear_replaced(path: Path) -> None:
    """The last reader removes what was left for it: a checkpoint that another one has taken the name of."""
    with suppress(OSError):
        if path.exists() and holder_of(path) is None and reader_of(path) is None:
            for left in path.parent.glob(f".{glob.escape(path.name)}.{PREVIOUS}-*"):
                delete(left)


def _take(file: Path, content: str, path: Path) -> Holder | None:
    """Take the lock, or say which live process has it."""
    while True:
        try:
            _make(file, content)
        except FileExistsError:
            if (holder := _remove_stale(file, path)) is not None:
                return holder
            continue
        return None


def _make(file: Path, content: str) -> None:
    """Make the lock, with its content at once: a process that is killed leaves none that says nothing.

    Raises FileExistsError where there is one.
    """
    try:
        descriptor = os.open(file.parent, os.O_TMPFILE | os.O_WRONLY, 0o644)
    except OSError:
        # Not every filesystem has files without a name.
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(content)
        return
    with os.fdopen(descriptor, "w") as stream:
        stream.write(content)
        stream.flush()
        # Python follows the link to the file only where a folder is given, which an absolute path makes no use of.
        os.link(f"/proc/self/fd/{descriptor}", file, src_dir_fd=descriptor, follow_symlinks=True)


def _remove_stale(file: Path, path: Path) -> Holder | None:
    """Remove a lock whose process is gone, one process at a time; returns the holder of one that is held."""
    try:
        with open(file) as stream:
            with suppress(OSError):
                # Where files cannot be locked, two that come at once may still take each other's lock away.
                fcntl.flock(stream, fcntl.LOCK_EX)
            if (holder := holder_of(path)) is None and os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                file.unlink()
            return holder
    except FileNotFoundError:
        # Whoever had it is done, or another process has removed it.
        return None


def _in_use(path: Path, file: Path, holder: Holder, purpose: str) -> str:
    here = holder.host == socket.gethostname()
    where = f"process {holder.pid} of this host ({holder.host})" if here else f"process {holder.pid} of {holder.host}"
    how = (
        "Wait until it is done, or choose another name."
        if here
        else f"Wait until it is done; if it no longer runs, remove {file}, or wait {STALE_AFTER_S:.0f} s for the "
        f"lock to expire."
    )
    verb = {"saving": "be written"}.get(purpose, "be used")
    return f"{path} cannot {verb} now: {where} is {holder.purpose} it. {how}"


def _keep_touching(file: Path, done: threading.Event) -> None:
    while not done.wait(TOUCH_EVERY_S):
        try:
            os.utime(file)
        except OSError:
            continue


def _now(folder: Path) -> float:
    """The time as the folder's file server sees it; its clock may differ from ours."""
    probe = folder / f".clock-{os.getpid()}-{threading.get_ident()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        try:
            probe.unlink(missing_ok=True)
        except OSError:
            pass
