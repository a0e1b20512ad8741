"""Start the other ranks of this machine as further processes of the user's script.

As with Lightning's launcher, the process that the user started is rank 0 and the others run the same script
again. What differs: each rank gets exactly this Hydra job's config, the ranks live and die together
(`supervisor.py`), and the environment variables that describe them exist only while a trainer call runs, so
that nothing leaks into the next job of a sweep. Under torchrun or a cluster's own starter nothing is started.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from typing_extensions import override

from lightning_npu_tp.devices.fault_text import may_be_lost_peer
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.launch.child_process import ChildProcess, parent_channel
from lightning_npu_tp.launch.first_failure import first_failure_named
from lightning_npu_tp.launch.hydra_job import HydraJob, current_job, program
from lightning_npu_tp.launch.signals import SignalWatch
from lightning_npu_tp.launch.supervisor import GRACE_SECONDS, Supervisor, end_now, write_to_stderr

# Given each trainer call, whose function and arguments it may read, and the trainer.
AroundCall = Callable[[functools.partial[Any], pl.Trainer | None], AbstractContextManager[None]]

_LEFT_BEHIND = "LOCAL_RANK, RANK, NODE_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")

# The ranks that this process has started. A module variable, because they belong to the script and not to a trainer:
# each of them runs the whole script, so a second fit, or a second Trainer, must meet the same ones again.
_supervisor: Supervisor | None = None
_reserved_port: socket.socket | None = None


class ProcessLauncher(_SubprocessScriptLauncher):
    """Runs trainer calls on all ranks of this machine; every rank needs one, the started ones too.

    cluster_environment: says who this process is, and whether somebody else starts the ranks.
    num_processes: ranks on this machine.
    num_nodes: machines.
    around_call: what each trainer call runs inside of, on this rank.
    """

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        num_processes: int,
        num_nodes: int,
        around_call: AroundCall = lambda call, trainer: nullcontext(),
    ) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._around_call = around_call
        # Asked now: while a call runs, the variable is there whoever starts the ranks.
        self._started_by_hand = _started_by_hand(cluster_environment)
        self._watch: SignalWatch | None = None
        self._current: Supervisor | None = None

    @override
    def launch(self, function: Callable, *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Run one trainer call on every rank; the first one of a script or job starts the other ranks.

        Returns what the function returned on this rank.
        Raises RankFailure if the call failed here because of another rank of this machine.
        """
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        call = functools.partial(self._run, functools.partial(function, *args, **kwargs), trainer)
        with _restored_environment():
            if not self.cluster_environment.creates_processes_externally:
                self._current = self._ranks_of_this_job()
                self.procs = [child.process for child in self._current.children]
                return self._current.call(call)
            channel = parent_channel()
            return call() if channel is None else channel.call(call)

    @property
    def hint(self) -> str:
        """What to look at if the other ranks do not come; a sentence."""
        if not self._started_by_hand:
            return "Look whether all of them were started and reach that address."
        return (
            f"LOCAL_RANK={self.cluster_environment.local_rank()} in its environment says that somebody else starts the "
            f"ranks. If nobody does, it is left from another run: unset {_LEFT_BEHIND}, and run again."
        )

    @override
    def kill(self, signum: int) -> None:
        """Send a signal to the ranks that this process started."""
        for child in self._current.children if self._current else ():
            child.ended_by_us = child.ended_by_us or signum == signal.SIGKILL
            child.process.send_signal(signum)

    def watch_signals(
        self, on_sigterm: Callable[[], None] | None = None, *, grace_seconds: float = GRACE_SECONDS
    ) -> None:
        """Take SIGTERM and Ctrl-C over from Lightning until the running trainer call ends.

        To be called on every rank when Lightning has registered its handlers: the strategy's
        `barrier("run-stage")` comes right after that. SIGTERM to one rank reaches all of them.

        on_sigterm: called in the main thread instead of raising SIGTERMException(143).
        grace_seconds: after which a rank that has not ended by itself is ended.
        """
        supervisor, channel = self._current, parent_channel()
        if supervisor is not None:
            supervisor.grace_seconds = grace_seconds
        if channel is not None:
            channel.send("grace", seconds=grace_seconds)

        def notice() -> None:
            if supervisor is not None and not supervisor.terminating:
                supervisor.terminating = True
                write_to_stderr("Rank 0 was asked to end by SIGTERM; this ends the run.")
            self.kill(signal.SIGTERM)
            if channel is not None:
                channel.send("terminated")

        def end(exit_code: int) -> None:
            reason = signal.Signals(exit_code - 128).name
            rank = self.cluster_environment.local_rank()
            write_to_stderr(
                f"Local rank {rank} did not end by itself within {grace_seconds:g} s of {reason}; it was ended."
            )
            if supervisor is not None:
                supervisor.end_run(None, exit_code)
            end_now(exit_code)

        if self._watch is not None:
            self._watch.close(unwinding=False)
        self._watch = SignalWatch(on_sigterm=on_sigterm, grace_seconds=grace_seconds, notice=notice, end=end)
        self._watch.install()

    def end_rank(self, error: BaseException) -> None:
        """End this rank from another thread, with an error that the trainer's thread does not come to report."""
        text = "".join(traceback.format_exception(error)).rstrip()
        write_to_stderr(text)
        if (channel := parent_channel()) is not None:
            channel.send("raised", traceback=text, may_be_lost_peer=may_be_lost_peer(error))
        if self._current is not None:
            self._current.end_run(None, 1)
        end_now(1)

    def _run(self, call: functools.partial[Any], trainer: pl.Trainer | None) -> Any:
        # Inside of Lightning's teardown, which closes the groups.
        with self._watched(), first_failure_named(), self._around_call(call, trainer):
            _set_num_threads_if_needed(num_processes=self.num_processes)
            return call()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Give the signals back after the block, if `watch_signals` took them meanwhile."""
        unwinding = True
        try:
            yield
            unwinding = False
        finally:
            if self._watch is not None:
                self._watch.close(unwinding=unwinding)
                self._watch = None

    def _ranks_of_this_job(self) -> Supervisor:
        """The other ranks, with the environment set for them; started unless this job has them already."""
        global _supervisor
        job = current_job()
        identity = None if job is None else (job.output_dir, job.number)
        if _supervisor is not None and _supervisor.job != identity:
            _end_previous_job(_supervisor)
            _supervisor = None
        if _supervisor is not None and len(_supervisor.children) not in (0, self.num_processes - 1):
            raise ConfigError(
                f"This Trainer asks for {self.num_processes} processes, but the script has already started "
                f"{len(_supervisor.children) + 1}, and each of them runs the whole script. "
                "Use the same trainer.devices for every Trainer of a script, or run them as jobs of a sweep."
            )
        self._set_environment()
        if _supervisor is None or len(_supervisor.children) != self.num_processes - 1:
            _supervisor = Supervisor(self._start_ranks(job), job=identity)
        return _supervisor

    def _set_environment(self) -> None:
        global _reserved_port
        environment = self.cluster_environment
        if "MASTER_PORT" not in os.environ and type(environment) is LightningEnvironment:
            _reserved_port = _reserved_port or _reserve_port()
            os.environ["MASTER_PORT"] = str(_reserved_port.getsockname()[1])
        # On one machine the ranks meet at home, whatever another run has left in the variable.
        at_home = self.num_nodes == 1 and type(environment) is LightningEnvironment
        os.environ["MASTER_ADDR"] = "127.0.0.1" if at_home else environment.main_address
        os.environ["MASTER_PORT"] = str(environment.main_port)
        os.environ["NODE_RANK"] = str(environment.node_rank())
        os.environ["LOCAL_RANK"] = str(environment.local_rank())
        os.environ["WORLD_SIZE"] = str(self.num_processes * self.num_nodes)

    def _start_ranks(self, job: HydraJob | None) -> list[ChildProcess]:
        first = self.cluster_environment.node_rank() * self.num_processes
        children = []
        for local_rank in range(1, self.num_processes):
            name = f"rank {first + local_rank}"
            env = {**os.environ, "LOCAL_RANK": str(local_rank)}
            # Nobody's here; left from another run it would be everybody's.
            env.pop("RANK", None)
            if job is None:
                command, cwd = [*program(os.getcwd()), *sys.argv[1:]], None
            else:
                # The rank's own traceback must be whole: it is what rank 0 reports.
                env["HYDRA_FULL_ERROR"] = "1"
                command = job.command(name=name.replace(" ", "_"), output_subdir=None)
                cwd = job.original_cwd
            children.append(ChildProcess(name, command, env=env, cwd=cwd))
        return children


def check_world(cluster_environment: ClusterEnvironment, num_processes: int, num_nodes: int) -> None:
    """Raise ConfigError if another number of processes was started from outside than the trainer asks for.

    Also for variables that describe no process of such a run: left in the environment by another one, they would make
    this process wait for ranks that nobody starts.
    num_processes: ranks on this machine, from trainer.devices.
    """
    if type(cluster_environment) is LightningEnvironment:
        _refuse_left_behind(cluster_environment, num_processes, num_nodes)
    if not cluster_environment.creates_processes_externally:
        return
    wanted = num_processes * num_nodes
    started = os.environ.get("WORLD_SIZE")
    if not isinstance(cluster_environment, LightningEnvironment):
        started = str(cluster_environment.world_size())
    here = os.environ.get("LOCAL_WORLD_SIZE")
    local_rank = cluster_environment.local_rank()
    if started is not None and int(started) != wanted:
        problem = f"{started} processes were started"
    elif here is not None and int(here) != num_processes:
        problem = f"{here} processes were started on this machine"
    elif local_rank >= num_processes:
        problem = f"this process was started as local rank {local_rank}, so there are at least {local_rank + 1}"
    else:
        return
    raise ConfigError(
        f"{problem[0].upper()}{problem[1:]}, but trainer.devices={num_processes} and trainer.num_nodes={num_nodes} ask "
        f"for {num_processes} on each machine, {wanted} in all. Set trainer.devices to the number of processes per "
        f"machine, or start {num_processes} per machine (torchrun --nproc-per-node={num_processes})."
    )


def _started_by_hand(environment: ClusterEnvironment) -> bool:
    """Whether LOCAL_RANK alone says that somebody else starts the ranks, and it was not this package."""
    return (
        type(environment) is LightningEnvironment
        and environment.creates_processes_externally
        and parent_channel() is None
    )


def _refuse_left_behind(environment: LightningEnvironment, num_processes: int, num_nodes: int) -> None:
    local_rank, node_rank = environment.local_rank(), environment.node_rank()
    rank, own = os.environ.get("RANK"), node_rank * num_processes + local_rank
    if node_rank >= num_nodes:
        problem = f"NODE_RANK={node_rank} (or GROUP_RANK) is in the environment, but trainer.num_nodes is {num_nodes}"
    elif rank is not None and rank != str(own) and parent_channel() is None:
        problem = f"RANK={rank} is in the environment, but by LOCAL_RANK and NODE_RANK this process is rank {own}"
    elif num_processes * num_nodes > 1 and "MASTER_PORT" not in os.environ and _started_by_hand(environment):
        problem = (
            f"LOCAL_RANK={local_rank} is in the environment, as if somebody else started the {num_processes} ranks of "
            f"this machine, but MASTER_PORT, where they would meet, is not"
        )
    else:
        return
    raise ConfigError(
        f"{problem}. If it is left from another run, unset {_LEFT_BEHIND}; if you start every rank yourself, set them "
        f"for each, or let torchrun do it."
    )


def _end_previous_job(supervisor: Supervisor) -> None:
    global _reserved_port
    if failure := supervisor.finish():
        write_to_stderr(failure.report())
    # A group that the last job has left open would silently be used for this one.
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    if _reserved_port is not None:
        _reserved_port.close()
        _reserved_port = None


def _reserve_port() -> socket.socket:
    """Bind a free port and hold it, without listening.

    A port that is only looked up can be given to another program in the seconds until the ranks have started. With
    SO_REUSEADDR on both sides the store may listen on a port that is merely held; nobody is given it by chance.
    """
    holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", 0))
    return holder


@contextlib.contextmanager
def _restored_environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _VARIABLES}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is not None:
                os.environ[name] = value
            else:
                os.environ.pop(name, None)
