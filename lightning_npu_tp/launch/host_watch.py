"""Ask the other hosts of a run whether they are still there.

When a collective gives up, torch says that it waited and not for whom. So the first rank of every host answers on a
TCP port of its own, from a thread, and whoever's collective has failed asks all of them. Nothing is sent meanwhile.
Addresses and ports are exchanged through the key-value store at start-up. A host that could not be asked even then
(a firewall) is never called silent. With one host no port is opened. What a failure means is said by
`trainer/explain_collective.py`.
"""

from __future__ import annotations

import ipaddress
import json
import secrets
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment

from lightning_npu_tp.launch.hosts import Host, hosts_of, name_hosts

# Three tries of TCP's first packet: at 0, 1 and 3 s. One lost packet is not a silent host.
PROBE_SECONDS = 4.0
_MOST_AT_ONCE = 32


@dataclass(frozen=True)
class Answer:
    """What a host said: "here", "ended" (the machine answers, the run's process is gone) or "silent"; and why."""

    host: Host
    state: Literal["here", "ended", "silent"]
    reason: str = ""


@dataclass(frozen=True)
class _Endpoint:
    """Where a host answers, and what it says there, so that another program on that port is no answer."""

    address: str
    port: int
    token: str


class HostWatch:
    """The hosts of a run, seen from one rank; made by `meet_hosts`.

    hosts: all of them, in the order of their ranks.
    rank:  of this process.
    """

    def __init__(self, hosts: Sequence[Host], rank: int) -> None:
        self.hosts = tuple(hosts)
        self.rank = rank
        self._endpoints: dict[Host, _Endpoint] = {}
        self._listener: socket.socket | None = None

    @property
    def here(self) -> Host:
        """This rank's host."""
        return next(host for host in self.hosts if self.rank in host.ranks)

    def ask(self, seconds: float = PROBE_SECONDS) -> list[Answer]:
        """Ask every other host that could be asked at start-up; takes at most about `seconds`. Communicates alone."""
        others = [(host, endpoint) for host, endpoint in self._endpoints.items() if host != self.here]
        if not others:
            return []
        with ThreadPoolExecutor(min(len(others), _MOST_AT_ONCE)) as pool:
            return list(pool.map(lambda other: _ask_host(other[0], other[1], seconds), others))

    def close(self) -> None:
        """Stop answering the other hosts' questions whether this one lives."""
        if self._listener is not None:
            # Closing alone would leave the thread in accept().
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None

    def _start_answering(self, family: int) -> _Endpoint:
        self._listener = socket.create_server(("", 0), family=family, backlog=128)
        token = secrets.token_hex(8)
        work = threading.Thread(target=_answer, args=(self._listener, token.encode()), name="host watch", daemon=True)
        work.start()
        return _Endpoint("", self._listener.getsockname()[1], token)


def meet_hosts(environment: ClusterEnvironment, store: dist.Store) -> HostWatch:
    """Learn where all ranks run; every rank calls it, with a store that only this group uses.

    Raises ConfigError on every rank if the ranks of a host are not consecutive.
    """
    rank, world = environment.global_rank(), environment.world_size()
    store.set(f"place/{rank}", json.dumps([environment.node_rank(), socket.gethostname()]))
    places = [json.loads(place) for place in store.multi_get([f"place/{other}" for other in range(world)])]
    watch = HostWatch(hosts_of(name_hosts([(node, name) for node, name in places])), rank)
    if len(watch.hosts) == 1:
        return watch
    is_first = rank == watch.here.ranks[0]
    if is_first:
        family, address = _own_address(environment.main_address, environment.main_port)
        endpoint = watch._start_answering(family)
        store.set(f"endpoint/{rank}", json.dumps([address, endpoint.port, endpoint.token]))
    endpoints = store.multi_get([f"endpoint/{host.ranks[0]}" for host in watch.hosts])
    watch._endpoints = {
        host: _Endpoint(*json.loads(endpoint)) for host, endpoint in zip(watch.hosts, endpoints, strict=True)
    }
    if is_first:
        reached = [answer.host.ranks[0] for answer in watch.ask() if answer.state == "here"]
        store.set(f"reached/{rank}", json.dumps(reached))
    (reached_json,) = store.multi_get([f"reached/{watch.here.ranks[0]}"])
    reached = json.loads(reached_json)
    watch._endpoints = {host: endpoint for host, endpoint in watch._endpoints.items() if host.ranks[0] in reached}
    return watch


def _own_address(main_address: str, main_port: int) -> tuple[int, str]:
    """Address family and address under which the other hosts reach this one."""
    family, _, _, _, target = socket.getaddrinfo(main_address, main_port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        # Sends nothing: it only picks the interface that leads to the first host.
        probe.connect(target)
        address = probe.getsockname()[0]
    # The first host may know its own name as a loopback address, which leads the others nowhere.
    return family, main_address if ipaddress.ip_address(address).is_loopback else address


def _answer(listener: socket.socket, token: bytes) -> None:
    while True:
        try:
            caller, _ = listener.accept()
        except OSError:
            return
        try:
            with caller:
                caller.settimeout(1.0)
                caller.sendall(token)
        except OSError:
            continue


def _ask_host(host: Host, endpoint: _Endpoint, seconds: float) -> Answer:
    try:
        with socket.create_connection((endpoint.address, endpoint.port), timeout=seconds) as caller:
            said = caller.recv(len(endpoint.token), socket.MSG_WAITALL)
    except (ConnectionRefusedError, ConnectionResetError) as error:
        return Answer(host, "ended", str(error))
    except OSError as error:
        return Answer(host, "silent", error.strerror or str(error))
    if said != endpoint.token.encode():
        return Answer(host, "ended", "another program answers on its port")
    return Answer(host, "here")
