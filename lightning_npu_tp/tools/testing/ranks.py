"""Run a function on several ranks of this machine and bring the results home.

`run_ranks` spawns fresh processes for one call; `RankPool` keeps its processes between calls,
because importing torch and Lightning costs each of them seconds, and gives every call a new process
group. Both return the ranks' results in order, raise the traceback of the rank that failed, bound
the time and show where the ranks hung. Results travel as bytes through pipes, so no shared-memory
file is made; a killed parent takes its ranks along. Nothing here knows pytest or a model.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning_npu_tp.devices.device import import_torch_npu
from lightning_npu_tp.errors import ConfigError, RankFailure
from lightning_npu_tp.launch.parent_death import die_with_parent

# Importing torch, Lightning and the function's module on a busy two-core machine; not part of a call's time-out.
START_TIMEOUT = 240.0
# How long the other ranks' reports are collected after the first failure: a rank that lost its
# peer often reports before the operating system tells us about the peer.
GRACE = 1.0

_HOST = "127.0.0.1"


class RankTimeout(RankFailure, TimeoutError):
    """Ranks were still running when the time was up; carries their stacks."""


@dataclass(frozen=True)
class _Call:
    """One call of a function on one rank, as sent to the process; `arguments` is a pickle."""

    module: str
    file: str | None
    function: str
    arguments: bytes
    backend: str | None
    store: str
    port: int
    timeout: float


@dataclass
class _Outcome:
    """What the ranks of one call reported: results by rank, failures in order of arrival."""

    results: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, backend: str | None = "gloo"
) -> list[Any]:
    """Run `fn(rank, world_size, *args)` in `world_size` fresh processes; return each rank's result.

    fn:      defined at the top level of a module (a test module will do).
    args:    picklable; every rank gets its own copy.
    timeout: seconds that the call itself may take, start-up and imports not counted.
    backend: of the default process group; None starts none and leaves that to `fn`. RANK, LOCAL_RANK,
             WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set either way, so that a Lightning Trainer
             inside `fn` takes the process for one of its own.

    Each rank computes with one thread and starts from the same seed. Results must be picklable; tensors
    arrive as CPU tensors.

    Raises RankFailure with the failing rank's traceback (the other ranks are killed) and RankTimeout
    with the stacks of the ranks that were still running.
    """
    with RankPool(world_size) as pool:
        return pool.run(fn, *args, timeout=timeout, backend=backend)


class RankPool:
    """`world_size` processes that run one function after another, each in a new process group.

    The processes start at the first call. A failure or time-out ends them, and the next call starts
    new ones, so that nothing of a failed test reaches the next. Close it, or use it in a `with`.
    """

    def __init__(self, world_size: int) -> None:
        if world_size < 1:
            raise ConfigError(f"world_size={world_size} ranks cannot run anything. Ask for one or more.")
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[connection.Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._num_calls = 0

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60.0, backend: str | None = "gloo") -> list[Any]:
        """Run `fn(rank, world_size, *args)` on every rank; arguments, result and errors as `run_ranks`."""
        if "<" in fn.__qualname__ or "." in fn.__qualname__:
            raise ConfigError(
                f"{fn.__qualname__} cannot be sent to another process. Define it at the top level of a module."
            )
        file = getattr(sys.modules.get(fn.__module__), "__file__", None)
        arguments = pickle.dumps(args)
        try:
            if not self._processes:
                self._start()
            assert self._folder is not None
            self._signal(signal.SIGCONT)
            self._num_calls += 1
            store = str(Path(self._folder.name) / f"store_{self._num_calls}")
            call = _Call(fn.__module__, file, fn.__name__, arguments, backend, store, free_port(), timeout)
            for pipe in self._pipes:
                _send(pipe, call)
            name = f"{fn.__module__}.{fn.__name__}"
            self._collect(START_TIMEOUT, f"importing {name}")
            results = self._collect(timeout, name)
            self._signal(signal.SIGSTOP)
        except BaseException:
            self.close()
            raise
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the processes at once and remove their temporary folder; safe to call twice."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder = [], [], None

    def _signal(self, signum: int) -> None:
        """Let the ranks rest between calls: what polls in them (torch_npu's release thread does) would take time."""
        for process in self._processes:
            os.kill(process.pid, signum)

    def _start(self) -> None:
        context = get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="ranks_")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, rank, self.world_size, self._stack_file(rank)),
                name=f"rank_{rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._collect(START_TIMEOUT, "starting the ranks")

    def _stack_file(self, rank: int) -> str:
        assert self._folder is not None
        return str(Path(self._folder.name) / f"stack_{rank}.txt")

    def _collect(self, timeout: float, what: str) -> dict[int, Any]:
        """Wait for one report of every rank; raise if one fails, dies or is late."""
        outcome = _Outcome()
        self._receive(outcome, deadline=time.monotonic() + timeout, stop_at_failure=True)
        if outcome.failures:
            self._receive(outcome, deadline=time.monotonic() + GRACE, stop_at_failure=False)
            raise RankFailure(_failure_text(outcome.failures, self.world_size, what))
        late = [rank for rank in range(self.world_size) if rank not in outcome.results]
        if late:
            raise RankTimeout(
                f"{what}: ranks {late} of {self.world_size} were still running after {timeout:g} s. "
                f"Their stacks, innermost call first:\n{self._stacks(late)}"
            )
        return outcome.results

    def _receive(self, outcome: _Outcome, *, deadline: float, stop_at_failure: bool) -> None:
        """Add reports to `outcome` until every rank has reported, the deadline, or a failure."""
        while True:
            waiting = [r for r in range(self.world_size) if r not in outcome.results and r not in outcome.failures]
            if not waiting or (stop_at_failure and outcome.failures):
                return
            pipes: dict[Any, int] = {self._pipes[rank]: rank for rank in waiting}
            ready = connection.wait(list(pipes), max(0.0, deadline - time.monotonic()))
            if not ready:
                return
            for pipe in ready:
                self._take(pipes[pipe], outcome)

    def _take(self, rank: int, outcome: _Outcome) -> None:
        try:
            succeeded, value = pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, ConnectionError):
            self._processes[rank].join(GRACE)
            died = f"rank {rank} died without a word; exit code {self._processes[rank].exitcode}.\n"
            # A rank that died is the cause; what its peers reported meanwhile is the consequence.
            outcome.failures = {rank: died} | outcome.failures
            return
        (outcome.results if succeeded else outcome.failures)[rank] = value

    def _stacks(self, ranks: list[int]) -> str:
        # A rank that has not come to open its file has no handler either, and the signal would end it.
        files = {rank: file for rank in ranks if (file := Path(self._stack_file(rank))).exists()}
        for rank in files:
            if self._processes[rank].is_alive():
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(GRACE)
        texts = {rank: "no stack: it is still starting\n" for rank in ranks}
        texts |= {rank: file.read_text() or "no stack: it does not react to signals\n" for rank, file in files.items()}
        return "\n".join(f"--- rank {rank} ---\n{text}" for rank, text in texts.items())


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago.

    Below those that systems give to connections: one of them could take it before it is used.
    """
    draw = random.SystemRandom()
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((_HOST, draw.randrange(15_000, 32_000)))
            return int(probe.getsockname()[1])


def _failure_text(failures: dict[int, str], world_size: int, what: str) -> str:
    first, *others = failures
    parts = [f"{what}: rank {first} of {world_size} failed:\n\n{failures[first]}"]
    parts += [f"\nrank {rank} failed too, {failures[rank].rstrip().splitlines()[-1]}" for rank in others]
    return "".join(parts)


def _send(pipe: connection.Connection, message: Any) -> None:
    # Not pipe.send: multiprocessing's own pickler would put tensors into shared-memory files.
    pipe.send_bytes(pickle.dumps(message))


def _serve(pipe: connection.Connection, rank: int, world_size: int, stack_file: str) -> None:
    """A rank's life: report that it is up, then run calls until the parent ends it."""
    starter = parent_process()
    assert starter is not None and starter.pid is not None
    die_with_parent(starter.pid)
    with open(stack_file, "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        import torch

        torch.set_num_threads(1)
        _send(pipe, (True, None))
        while True:
            try:
                call = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return
            _send(pipe, _run(call, rank, world_size, pipe))


def _run(call: _Call, rank: int, world_size: int, pipe: connection.Connection) -> tuple[bool, Any]:
    import torch
    import torch.distributed as dist

    environment = dict(os.environ)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR=_HOST, MASTER_PORT=str(call.port)
    )
    # gloo otherwise resolves the host's name, which is slow or impossible on many machines.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    try:
        torch.manual_seed(0)
        random.seed(0)
        function = getattr(_import(call.module, call.file), call.function)
        arguments = pickle.loads(call.arguments)
        # From here the time counts.
        _send(pipe, (True, None))
        if call.backend is not None:
            if "hccl" in call.backend:
                # It registers its backend with torch; nothing that a rank has imported so far needs it.
                import_torch_npu()
            dist.init_process_group(
                call.backend,
                store=dist.FileStore(call.store, world_size),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=max(call.timeout, 1.0) + 10),
            )
            # A function that destroys the group must not do so while a peer still connects to this rank.
            dist.barrier()
        result = function(rank, world_size, *arguments)
        # Pickled here so that a result that cannot travel is this rank's failure, with its traceback.
        pickle.dumps(result)
        if dist.is_initialized():
            # Nobody may leave while a peer still needs the connection.
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        # The process group stays: destroying it now would make the peers fail as well.
        return False, traceback.format_exc()
    os.environ.clear()
    os.environ.update(environment)
    del function, arguments
    _let_go_of_groups()
    gc.collect()
    return True, result


def _let_go_of_groups() -> None:
    """Empty the meshes that DTensor's caches keep: each keeps its groups, whose threads slow the calls that follow."""
    from torch.distributed.device_mesh import DeviceMesh

    for thing in gc.get_objects():
        if type(thing) is DeviceMesh:
            getattr(thing, "_pg_registry", {}).clear()


def _import(name: str, file: str | None) -> Any:
    """The module `name`, from `file` where the name alone does not lead there."""
    if name in sys.modules or file is None:
        return importlib.import_module(name)
    try:
        module = importlib.import_module(name)
        if getattr(module, "__file__", None) == file:
            return module
    except ModuleNotFoundError:
        pass
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
