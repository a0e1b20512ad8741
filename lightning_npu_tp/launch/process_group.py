"""The default process group of a run: opened per trainer call, destroyed at its end, opened again.

Lightning leaves the group of one fit to the next trainer, with whatever world size it had. Here each
trainer call opens its own and destroys it. The key-value store behind it is kept per process and each
group gets keys of its own in it, so that a rank that is already opening the next group never meets
the remains of the last one, under torchrun's agent store as well. Once it is open the ranks tell each
other on which hosts they are.
"""

from __future__ import annotations

import os
from collections import Counter
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment

from lightning_npu_tp.devices.device import NPU, group_options, group_timeout
from lightning_npu_tp.launch.host_watch import HostWatch, meet_hosts
from lightning_npu_tp.launch.meeting import keys_of_this_start, waiting_is_told

_Key = tuple[str, str, int, int]
_stores: dict[_Key, dist.Store] = {}
# Groups made over each store. Not over all of them: ranks that a later job of a sweep starts begin at one.
_generations: Counter[_Key] = Counter()
_watch: HostWatch | None = None


def open_process_group(
    environment: ClusterEnvironment,
    *,
    backend: str,
    timeout: timedelta,
    device: torch.device,
    buffer_mb: int | None = None,
    hint: str = "",
) -> None:
    """Make a default process group of all ranks; every rank calls it the same number of times.

    backend: as torch.distributed names it, e.g. "gloo" or "cpu:gloo,npu:hccl".
    timeout: of each collective, and of meeting the other ranks.
    buffer_mb: of one of the group's two buffers, on npu; None is what the environment says.
    hint: what to look at, told while some rank does not come.
    Raises ConfigError on every rank if the ranks of a host are not consecutive.
    """
    global _watch
    rank, world = environment.global_rank(), environment.world_size()
    store: dist.Store = dist.HashStore()
    if world > 1:
        os.environ["MASTER_ADDR"] = environment.main_address
        os.environ["MASTER_PORT"] = str(environment.main_port)
        key = (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], rank, world)
        if key not in _stores:
            with waiting_is_told(rank, world, f"{key[0]}:{key[1]}", hint):
                meeting = dist.rendezvous("env://", rank=rank, world_size=world, timeout=timeout)
                _stores[key] = next(iter(meeting))[0]
                if dist.is_torchelastic_launched():
                    _stores[key] = keys_of_this_start(_stores[key], rank=rank, world=world, timeout=timeout)
        _generations[key] += 1
        store = dist.PrefixStore(f"lightning_npu_tp/{_generations[key]}", _stores[key])
    options = group_options(device.type, timeout=timeout, buffer_mb=buffer_mb) if device.type == NPU else None
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world,
        timeout=group_timeout(device.type, timeout),
        device_id=None if device.type == "cpu" else device,
        pg_options=None if options is None else options[1],
    )
    if world > 1:
        _watch = meet_hosts(environment, store)


def host_watch() -> HostWatch | None:
    """The hosts of the open process group; None for one rank, or while none is open."""
    return _watch


def close_process_group() -> None:
    """Destroy the default process group if there is one."""
    global _watch
    if _watch is not None:
        _watch.close()
        _watch = None
    if dist.is_available() and dist.is_initialized():
        try:
            dist.destroy_process_group()
        except RuntimeError:
            # torch_npu would try again when the interpreter ends, and print a traceback under the error that explains.
            dist.distributed_c10d._world.pg_names.clear()
            raise
