"""Give every job of a Hydra sweep a process of its own.

Hydra's own launcher runs all jobs of `-m` in one process, where device memory, process groups, environment
variables and a crash of one job reach the next. A script calls its work through `run_job`; everything else
about the sweep (order, folders, what a failed job means) stays Hydra's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from lightning_npu_tp.errors import RankFailure
from lightning_npu_tp.launch.child_process import ChildProcess, end_processes, parent_channel
from lightning_npu_tp.launch.hydra_job import HydraJob, current_job
from lightning_npu_tp.launch.signals import TERMINATED
from lightning_npu_tp.launch.supervisor import GRACE_SECONDS, write_to_stderr

log = logging.getLogger(__name__)

Config = TypeVar("Config")
# What Hydra writes after an error.
_HYDRA_HINT = "Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace."


def run_job(task: Callable[[Config], Any], config: Config) -> Any:
    """Call `task(config)`: here, or in a fresh process if this one runs a sweep. Returns its value either way.

    The fresh process runs the same script as a plain job with this job's folder and exactly this job's config,
    and gets here again. What `task` returns must then be numbers, strings, None, or lists and dicts of them
    (a tensor or array of one element counts as a number), else the sweep sees None.
    Raises RankFailure with the end of the job's stderr if it failed; Hydra then goes on with the next job.
    """
    job = current_job()
    # Ranks that somebody else has started, by torchrun for instance, are one job already.
    if job is not None and job.in_sweep and not {"LOCAL_RANK", "SUBMITIT_EXECUTOR"} & os.environ.keys():
        return _run_in_fresh_process(job)
    channel = parent_channel()
    value = task(config)
    if channel is not None:
        try:
            channel.send("result", value=_plain(value))
        except TypeError as error:
            log.warning(f"The sweep sees None as the value of this job: {error}.")
    return value


def _run_in_fresh_process(job: HydraJob) -> Any:
    number = 0 if job.number is None else job.number
    # A folder below the job's own: the job saves its config for its ranks, and must not overwrite the overrides
    # that the sweep has saved.
    subdir = None if job.output_subdir is None else os.path.join(job.output_subdir, "job")
    command = job.command(name=job.name, output_subdir=subdir)
    process = ChildProcess(f"job {number}", command, env=os.environ, cwd=job.original_cwd)
    try:
        with _sigterm_raises():
            process.process.wait()
    finally:
        # Only after an exception (Ctrl-C, SIGTERM) does it still run. It has ranks of its own to end, and perhaps a
        # checkpoint to save, for which its strategy sets the time.
        told = process.last("grace")
        end_processes([process], patience=(GRACE_SECONDS if told is None else told["seconds"]) + 2)
    assert not process.is_alive
    if process.exit_code == TERMINATED:
        write_to_stderr(f"Job {number} was asked to end by SIGTERM; this ends the sweep.")
        raise SystemExit(TERMINATED)
    if process.exit_code != 0:
        raise RankFailure(
            f"Job {number} of the sweep, in {job.output_dir}, {process.describe_end()}. "
            f"The end of its output:\n\n{(process.traceback() or process.tail()).removesuffix(_HYDRA_HINT).rstrip()}"
        )
    result = process.last("result")
    return None if result is None else result["value"]


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM leave the block by an exception, so that the job inside is ended first."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if getattr(value, "size", None) is not None and hasattr(value, "item"):
        try:
            return value.item()
        except (RuntimeError, ValueError) as error:
            raise TypeError(str(error)) from error
    raise TypeError(f"{type(value).__name__} is neither a number, a string nor a list or dict of them")
