"""Count the bytes that a rank must send, from the collectives that are really issued.

`CountTraffic` sees every collective that passes torch's dispatcher while it is open: ours, forward and backward,
FSDP's, DTensor's and those of clipping. It reckons what the bandwidth-optimal algorithm sends per rank, not what
a backend does within. `tests/least_traffic.py` says what a layout must move at least.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_npu_tp.parallel.layout import DATA_AXIS, EXPERT_AXIS, EXPERT_REPLICA_AXIS, TENSOR_AXIS, Meshes

# Operator without overload -> (what it is, position of the argument whose bytes count).
_OPERATIONS = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::allreduce_coalesced_": ("all_reduce", 0),
    "c10d::allgather_": ("all_gather", 1),
    "c10d::_allgather_base_": ("all_gather", 1),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", 1),
    "c10d::reduce_scatter_": ("reduce_scatter", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 0),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", 0),
    "c10d::alltoall_base_": ("all_to_all", 1),
    "c10d::broadcast_": ("broadcast", 0),
    "_c10d_functional::all_reduce": ("all_reduce", 0),
    "_c10d_functional::all_reduce_": ("all_reduce", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", 0),
    # Its argument is the whole: n times what a rank gets.
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter_whole", 0),
    "_c10d_functional::broadcast": ("broadcast", 0),
}
_SILENT = {
    "c10d::barrier",
    "c10d::monitored_barrier_",
    "_c10d_functional::wait_tensor",
    "_c10d_functional::_wrap_tensor_autograd",
}


class CountTraffic(TorchDispatchMode):
    """While inside, count what this rank sends, in bytes.

    sent:  bytes by (axis, operation): the axis of the layout's meshes, "world" or "other"; "all_reduce",
           "all_gather", "reduce_scatter", "all_to_all" or "broadcast". An all-reduce of x bytes over n ranks
           sends 2 (n - 1) / n x, a gather or scatter (n - 1) / n of the whole, an all-to-all what goes to others.
    calls: collectives by the same key.

    Raises NotImplementedError for a collective that it cannot reckon, so that none is missed.
    """

    def __init__(self, meshes: Meshes) -> None:
        super().__init__()
        self.sent: dict[tuple[str, str], float] = {}
        self.calls: Counter[tuple[str, str]] = Counter()
        # Axes of the same ranks may share a group: the last one names it. Rows go to experts only.
        named = {
            EXPERT_AXIS: meshes.expert[EXPERT_AXIS],
            EXPERT_REPLICA_AXIS: meshes.expert[EXPERT_REPLICA_AXIS],
            DATA_AXIS: meshes.dense[DATA_AXIS],
            TENSOR_AXIS: meshes.dense[TENSOR_AXIS],
        }
        self._axes = {mesh.get_group().group_name: axis for axis, mesh in named.items()}
        self._expert_group = meshes.expert_group.group_name

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().partition(".")[0]
        if name.startswith(("c10d::", "_c10d_functional::")) and name not in _SILENT:
            self._count(name, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in _OPERATIONS:
            raise NotImplementedError(f"{name} is a collective whose bytes nobody has reckoned. Add it to _OPERATIONS.")
        operation, position = _OPERATIONS[name]
        group = _group_of(func, args, kwargs)
        ranks = group.size()
        size = sum(t.numel() * t.element_size() for t in tree_leaves(args[position]) if isinstance(t, Tensor))
        if operation == "all_to_all":
            sent = float(size - _kept(args[position], args[4], ranks, group.rank()))
        elif operation in ("all_gather", "reduce_scatter"):
            sent = float(size * (ranks - 1))
        else:
            sent = size * (ranks - 1) / ranks * (2 if operation == "all_reduce" else 1)
        if operation == "all_to_all" and group.group_name == self._expert_group:
            axis = EXPERT_AXIS
        else:
            is_world = dist.group.WORLD is not None and ranks == dist.group.WORLD.size()
            axis = self._axes.get(group.group_name, "world" if is_world else "other")
        key = axis, operation.removesuffix("_whole")
        self.sent[key] = self.sent.get(key, 0.0) + sent
        self.calls[key] += 1


def _kept(rows: Tensor, splits: list[int], ranks: int, rank: int) -> int:
    """Bytes of an all-to-all's input that stay on their rank."""
    own = splits[rank] if splits else rows.shape[0] // ranks
    return own * (rows[0].numel() if rows.shape[0] else 0) * rows.element_size()


def _group_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dist.ProcessGroup:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.name == "group_name":
            return dist.distributed_c10d._resolve_process_group(value)
        if argument.name == "process_group":
            return value if isinstance(value, dist.ProcessGroup) else dist.ProcessGroup.unbox(value)
    raise NotImplementedError(f"{func.name()} names no process group.")
