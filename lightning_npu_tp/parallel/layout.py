"""The layout of a run: how many ranks split the data, the tensors and the experts.

`Layout` is validated once, before any process group exists; `Meshes` holds the device meshes built
from it. Nothing here knows a model: whether a size divides heads or experts is the plan's question
(`plan.py`), which can name the sizes that work.

    world = data * tensor                the tensor axis is fastest, so that it stays inside a host
    world = expert_replicas * expert     a second view of the same ranks; expert = m * tensor

Source: the two-view layout is the one of Megatron-LM's expert parallelism and of FSDP2 with EP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from lightning_npu_tp.devices.device import group_options
from lightning_npu_tp.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Size = int | Literal["auto"]

DATA_AXIS = "data_parallel"
TENSOR_AXIS = "tensor_parallel"
EXPERT_REPLICA_AXIS = "expert_replica"
EXPERT_AXIS = "expert_parallel"


def divisors(number: int) -> list[int]:
    """All positive divisors of `number`, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


@dataclass(frozen=True)
class Layout:
    """Sizes of the data, tensor and expert axes; `resolve` is the way to make one."""

    data: int
    tensor: int
    expert: int

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.data * self.tensor

    @property
    def expert_replicas(self) -> int:
        """Number of ranks that hold the same experts."""
        return self.world // self.expert

    @property
    def axes_of_all(self) -> list[str]:
        """Axes that have all ranks: the default group is theirs, and carries what they do."""
        sizes = {
            DATA_AXIS: self.data,
            TENSOR_AXIS: self.tensor,
            EXPERT_REPLICA_AXIS: self.expert_replicas,
            EXPERT_AXIS: self.expert,
        }
        return [axis for axis, size in sizes.items() if size == self.world]

    @classmethod
    def resolve(cls, *, world: int, data: Size = "auto", tensor: Size = "auto", expert: Size = "auto") -> Layout:
        """Turn sizes of which any may be "auto" into a layout of `world` ranks.

        auto: tensor takes what data leaves, data takes what tensor leaves, both auto means that all
        ranks are tensor-parallel; expert follows tensor.

        Raises ConfigError, with the sizes that would work, for a size that is not a positive
        integer, for `data * tensor != world` and for an expert size that is not a multiple of
        tensor dividing the world.
        """
        for name, size in (("data", data), ("tensor", tensor), ("expert", expert)):
            if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise ConfigError(
                    f"{name}_parallel_size={size!r} is neither 'auto' nor a positive integer. "
                    f"Set strategy.{name}_parallel_size to 'auto' or a number of devices."
                )
        for name, size in (("data", data), ("tensor", tensor)):
            if size != "auto" and world % size:
                raise ConfigError(
                    f"{name}_parallel_size={size} does not divide the {world} devices of this run. "
                    f"Set strategy.{name}_parallel_size to one of {divisors(world)}, or change trainer.devices."
                )
        if tensor == "auto":
            tensor = world if data == "auto" else world // data
        if data == "auto":
            data = world // tensor
        if data * tensor != world:
            raise ConfigError(
                f"data_parallel_size={data} times tensor_parallel_size={tensor} is {data * tensor}, but this run has "
                f"{world} devices. Set one of the two to 'auto', or trainer.devices to {data * tensor}."
            )
        if expert == "auto":
            expert = tensor
        if expert % tensor or world % expert:
            works = [size for size in divisors(world) if size % tensor == 0]
            raise ConfigError(
                f"expert_parallel_size={expert} must be a multiple of tensor_parallel_size={tensor} and divide the "
                f"{world} devices. Set strategy.expert_parallel_size to 'auto' or one of {works}."
            )
        return cls(data=data, tensor=tensor, expert=expert)


Dispatch = Literal["auto", "replicated", "all_to_all"]
DISPATCH: tuple[Dispatch, ...] = ("auto", "replicated", "all_to_all")


def resolve_dispatch(layout: Layout, dispatch: Dispatch) -> Dispatch:
    """How tokens reach their experts in this layout; auto exchanges nothing where that works.

    Raises ConfigError for a dispatch that does not exist or that the layout does not allow.
    """
    if dispatch not in DISPATCH:
        raise ConfigError(f"dispatch={dispatch!r} does not exist. Set strategy.dispatch to one of {list(DISPATCH)}.")
    if dispatch == "auto":
        return "replicated" if layout.expert == layout.tensor else "all_to_all"
    if dispatch == "replicated" and layout.expert != layout.tensor:
        raise ConfigError(
            f"dispatch=replicated needs experts divided over the {layout.tensor} tensor ranks, which see the same "
            f"tokens, but expert_parallel_size={layout.expert}. Set strategy.dispatch to auto or all_to_all, or "
            f"strategy.expert_parallel_size={layout.tensor}."
        )
    return dispatch


@dataclass(frozen=True)
class Meshes:
    """The device meshes of one layout.

    dense:  [data, tensor], for every parameter that is no expert.
    expert: [expert_replica, expert], for stacked expert parameters.

    The groups are looked up once: a mesh searches its ranks on every question.
    """

    layout: Layout
    dense: DeviceMesh
    expert: DeviceMesh

    @classmethod
    def build(
        cls,
        layout: Layout,
        device_type: str,
        *,
        timeout: timedelta = timedelta(minutes=30),
        buffers_mb: Mapping[str, int] | None = None,
    ) -> Meshes:
        """Create the meshes; the default process group must exist and have `layout.world` ranks.

        An axis of all ranks uses the default group, with what that was opened with.
        timeout:    of the collectives of the other groups.
        buffers_mb: axis -> MB of a buffer of its groups, on npu; what is not named has the environment's.
        """
        from torch.distributed.device_mesh import init_device_mesh

        def mesh(sizes: dict[str, int]) -> DeviceMesh:
            options: dict[Any, Any] = {
                axis: group_options(device_type, timeout=timeout, buffer_mb=(buffers_mb or {}).get(axis))
                for axis, size in sizes.items()
                if size < layout.world
            }
            chosen = {axis: option for axis, option in options.items() if option is not None}
            return init_device_mesh(
                device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes), backend_override=chosen
            )

        return cls(
            layout=layout,
            dense=mesh({DATA_AXIS: layout.data, TENSOR_AXIS: layout.tensor}),
            expert=mesh({EXPERT_REPLICA_AXIS: layout.expert_replicas, EXPERT_AXIS: layout.expert}),
        )

    @cached_property
    def tensor_group(self) -> ProcessGroup:
        """Ranks that hold the slices of one dense parameter and see the same tokens."""
        return self.dense[TENSOR_AXIS].get_group()

    @cached_property
    def data_group(self) -> ProcessGroup:
        """Ranks that hold the same dense slice and see different tokens."""
        return self.dense[DATA_AXIS].get_group()

    @cached_property
    def expert_group(self) -> ProcessGroup:
        """Ranks among which the experts are divided."""
        return self.expert[EXPERT_AXIS].get_group()

    def drop_groups(self) -> None:
        """Drop the groups, which are about to be destroyed.

        DTensor's caches keep meshes for as long as the process lives, and a mesh its groups: their connections and
        threads would stay with them.
        """
        for mesh in (self.dense, self.expert):
            # Not in every torch; there a mesh has names only.
            getattr(mesh, "_pg_registry", {}).clear()
        for group in ("tensor_group", "data_group", "expert_group"):
            self.__dict__.pop(group, None)


class Groups:
    """The process groups that sharded modules look up at each use.

    A trainer may destroy the process group after a fit and build another for the next, so modules
    keep this object and not the groups. A group of one rank is None: nothing to communicate with,
    no collective to skip. Copies of a model share it (a process group cannot be copied).
    """

    def __init__(self, meshes: Meshes | None = None) -> None:
        self._tensor: ProcessGroup | None = None
        self._expert: ProcessGroup | None = None
        self._closed = False
        self.meshes = meshes
        if meshes is not None:
            self.bind(meshes)

    def bind(self, meshes: Meshes) -> None:
        """Use the groups of these meshes from now on."""
        self.meshes = meshes
        self._tensor = meshes.tensor_group if meshes.layout.tensor > 1 else None
        self._expert = meshes.expert_group if meshes.layout.expert > 1 else None
        self._closed = False

    def close(self) -> None:
        """Forget the groups; called when the process group is destroyed."""
        if self.meshes is not None:
            self.meshes.drop_groups()
        self._closed = self.meshes is not None and self.meshes.layout.world > 1
        self._tensor = self._expert = None

    def tensor(self) -> ProcessGroup | None:
        """Group of the ranks that split dense parameters, or None for one rank."""
        self.require_open()
        return self._tensor

    def expert(self) -> ProcessGroup | None:
        """Group of the ranks that divide the experts, or None for one rank."""
        self.require_open()
        return self._expert

    def require_open(self) -> None:
        """Raise ConfigError for a model of several ranks whose process group is gone."""
        if self._closed:
            raise ConfigError(
                "The sharded model was called after the trainer had destroyed its process group, so its ranks cannot "
                "talk to each other. Call it inside a Trainer method (fit, validate, test, predict) or inside "
                "`with trainer.strategy.process_group():` on every rank."
            )

    def __deepcopy__(self, memo: dict[int, object]) -> Groups:
        return self
