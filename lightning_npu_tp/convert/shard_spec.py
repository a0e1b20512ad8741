"""Which part of a parameter a rank holds: reckoned once, for all that fill, place, load or count the parameter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_npu_tp.convert.data_parallel import DataParallel
from lightning_npu_tp.models.file_names import Bounds
from lightning_npu_tp.parallel.layout import EXPERT_AXIS, TENSOR_AXIS, Layout, Meshes
from lightning_npu_tp.parallel.plan import Rule, chunk_bounds


@dataclass(frozen=True)
class ShardSpec:
    """Where one parameter lies on one rank; bounds are (first, one past the last) index per dimension.

    shape:     global.
    bounds:    of the rank's part on the axis of the rule.
    held:      of what the rank keeps of that part, less where FSDP shares it over data ranks or expert replicas.
    is_shared: whether FSDP does.
    mesh:      the axis of the rule; None in arithmetic about ranks that do not exist.
    """

    rule: Rule
    shape: tuple[int, ...]
    bounds: Bounds
    held: Bounds
    is_shared: bool
    mesh: DeviceMesh | None = None

    @classmethod
    def of(
        cls,
        rule: Rule,
        shape: tuple[int, ...],
        layout: Layout,
        rank: int,
        data_parallel: DataParallel = "shard",
        meshes: Meshes | None = None,
    ) -> ShardSpec:
        """The spec of a parameter of global `shape` on global `rank` of `layout`."""
        is_expert = rule.axis == "expert"
        ranks = layout.expert if is_expert else layout.tensor
        replicas = layout.world // ranks
        bounds = [(0, size) for size in shape]
        if rule.dim is not None:
            bounds[rule.dim] = chunk_bounds(shape[rule.dim], rank % ranks, ranks)
        # FSDP takes no parameter without elements, such as those of no shared experts.
        held, is_shared = list(bounds), data_parallel == "shard" and replicas > 1 and 0 not in shape
        if is_shared:
            # As `parallelize_over_data` does: experts by their width where there are fewer of them than replicas.
            dim = 1 if is_expert and bounds[0][1] - bounds[0][0] < replicas else 0
            start, stop = bounds[dim]
            first, last = chunk_bounds(stop - start, rank // ranks, replicas)
            held[dim] = (start + first, start + last)
        mesh = None
        if meshes is not None:
            mesh = meshes.expert[EXPERT_AXIS] if is_expert else meshes.dense[TENSOR_AXIS]
        return cls(rule, tuple(shape), tuple(bounds), tuple(held), is_shared, mesh)

    def cut(self, whole: Tensor) -> Tensor:
        """The rank's part of the global tensor, contiguous and of its own, so that the memory of `whole` can go."""
        part = whole[tuple(slice(*pair) for pair in self.bounds)]
        return part.clone(memory_format=torch.contiguous_format)

    def placed(self, part: Tensor) -> DTensor:
        """The DTensor of global shape whose local tensor is `part`, the rank's part."""
        stride = torch.empty(self.shape, device="meta").stride()
        shape = torch.Size(self.shape)
        return DTensor.from_local(part, self.mesh, (self.rule.placement,), run_check=False, shape=shape, stride=stride)


def size_of(bounds: Bounds) -> tuple[int, ...]:
    """Shape of the part that lies within `bounds`."""
    return tuple(stop - start for start, stop in bounds)
