"""Which ranks lie on which host, and which groups of a layout cross hosts.

Pure functions over names and sizes: how the names are gathered is `host_watch.py`. A layout is fast only if its
tensor and expert groups stay inside a host, and they do so only if the ranks of one host are consecutive, so that
is checked once, before anything is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import override

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.parallel.layout import Layout, divisors

# Of host names in one line; a cluster has too many to list.
_MOST_NAMES = 4


@dataclass(frozen=True)
class Host:
    """One machine of the run and its ranks, ascending."""

    name: str
    ranks: tuple[int, ...]

    @override
    def __str__(self) -> str:
        return f"{self.name} ({ranks_in_words(self.ranks)})"


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Ascending ranks for people: "rank 3", "ranks 0 and 1", "ranks 0 to 7", "ranks 0, 2, 4"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) == 2:
        return f"ranks {ranks[0]} and {ranks[1]}"
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def name_hosts(places: Sequence[tuple[int, str]]) -> list[str]:
    """A name of its own for every host, by rank.

    places: (node rank, host name) of each rank. Containers of one machine may share a name; the node rank tells them
    apart and is then part of the name.
    """
    nodes: dict[str, set[int]] = {}
    for node, name in places:
        nodes.setdefault(name, set()).add(node)
    return [f"{name} [node {node}]" if len(nodes[name]) > 1 else name for node, name in places]


def hosts_of(names: Sequence[str]) -> tuple[Host, ...]:
    """The hosts in the order of their ranks.

    names: the name of each rank's host, by rank.
    Raises ConfigError, the same on every rank, if the ranks of a host are not consecutive.
    """
    ranks: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        ranks.setdefault(name, []).append(rank)
    hosts = tuple(Host(name, tuple(its_ranks)) for name, its_ranks in ranks.items())
    for host in hosts:
        first, last = host.ranks[0], host.ranks[-1]
        if last - first + 1 != len(host.ranks):
            between = next(rank for rank in range(first, last) if rank not in host.ranks)
            raise ConfigError(
                f"The ranks of one host must be consecutive, so that tensor and expert groups stay inside it, but "
                f"host {host} has rank {between} of host {names[between]} in between. Number the ranks host by host: "
                f"srun --distribution=block (not cyclic), or torchrun with one --node-rank per host."
            )
    return hosts


def groups_of(layout: Layout) -> dict[str, list[list[int]]]:
    """The ranks of every group of each axis; axes of size one are left out."""
    world, tensor, expert = range(layout.world), layout.tensor, layout.expert
    axes = {
        "tensor": [[rank for rank in world if rank // tensor == row] for row in range(layout.data)],
        "data": [[rank for rank in world if rank % tensor == column] for column in range(tensor)],
        "expert": [[rank for rank in world if rank // expert == row] for row in range(layout.expert_replicas)],
        "expert replica": [[rank for rank in world if rank % expert == column] for column in range(expert)],
    }
    return {axis: groups for axis, groups in axes.items() if len(groups[0]) > 1}


def crossings(hosts: Sequence[Host], layout: Layout) -> list[str]:
    """Lines for the start-up summary: for each axis whether its groups stay inside a host; none for one host."""
    if len(hosts) < 2:
        return []
    host_by_rank = {rank: host for host in hosts for rank in host.ranks}
    lines = []
    for axis, groups in groups_of(layout).items():
        spans = [list(dict.fromkeys(host_by_rank[rank].name for rank in group)) for group in groups]
        widest = max(spans, key=len)
        if len(widest) == 1:
            lines.append(f"{axis} groups inside a host")
        elif all(span == widest for span in spans) and len(widest) <= _MOST_NAMES:
            lines.append(f"{axis} groups cross {len(widest)} hosts ({', '.join(widest)})")
        else:
            lines.append(f"{axis} groups cross up to {len(widest)} of {len(hosts)} hosts")
        if axis == "tensor" and len(widest) > 1:
            sizes = divisors(min(len(host.ranks) for host in hosts))
            lines[-1] += f": every layer waits for the network; strategy.tensor_parallel_size of {sizes} would not"
    return lines
