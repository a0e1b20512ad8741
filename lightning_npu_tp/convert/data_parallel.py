"""Data parallelism of a converted model: torch's FSDP2, or its replicate, over two meshes.

Dense parameters are shared over the data axis, experts over their replicas. Gradients are averaged over
the data ranks: an expert's gradient has summed the tokens of every data rank in its expert group
already, so it too is divided by the number of data ranks, not by that of its replicas.

Beside what FSDP owns there are parameters of a user's own layers, plain tensors that every rank holds
whole; `average_plain_gradients` is their reduction.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import Shard

from lightning_npu_tp.convert.gather_on_call import gather_on_call
from lightning_npu_tp.models.moe.experts import RoutedExperts
from lightning_npu_tp.parallel.layout import DATA_AXIS, EXPERT_REPLICA_AXIS, Groups, Meshes
from lightning_npu_tp.parallel.tensor_region import local

DataParallel = Literal["shard", "replicate"]
DATA_PARALLEL: tuple[DataParallel, ...] = ("shard", "replicate")


def parallelize_over_data(model: nn.Module, layers: str, meshes: Meshes, how: DataParallel, groups: Groups) -> None:
    """Share a converted model's parameters and gradients over the data ranks, in place.

    layers: path of the list of decoder layers, each of which is gathered by itself while it computes, as is
            the rest of the decoder around it; a model without such a list is gathered as a whole.
    how:    "shard" keeps one slice of parameters, gradients and optimizer states per data rank;
            "replicate" keeps them whole and sums gradients.
    groups: of the model, closed when its process group goes.
    """
    layout = meshes.layout
    # FSDP takes no parameter without elements.
    alone = {parameter for parameter in model.parameters() if not parameter.numel()}
    for experts in [module for module in model.modules() if isinstance(module, RoutedExperts)]:
        # What FSDP's averaging over the replicas leaves of an average over the data ranks. Not its own
        # divide factor, which it applies twice where there is nothing to scatter.
        experts.gradient_divisor = layout.data // layout.expert_replicas
        if layout.expert_replicas > 1:
            _wrap(experts, meshes.expert[EXPERT_REPLICA_AXIS], how, set())
        else:
            alone.update(experts.parameters())
    stacked = dict(model.named_modules()).get(layers)
    for layer in stacked.children() if isinstance(stacked, nn.ModuleList) else ():
        _wrap(layer, meshes.dense[DATA_AXIS], how, alone)
    decoder = layers.rpartition(".")[0]
    # By itself too: called without its head, it gathers no more than it needs. Not if the two share a parameter.
    if decoder and isinstance(stacked, nn.ModuleList) and not _shares_parameters(model, decoder):
        _wrap(model.get_submodule(decoder), meshes.dense[DATA_AXIS], how, alone)
    _wrap(model, meshes.dense[DATA_AXIS], how, alone)
    gather_on_call(model, groups)


@torch.no_grad()
def allocate_shards(model: nn.Module, device: torch.device) -> None:
    """Give memory to parameters that went through `parallelize_over_data` on the meta device; values are undefined."""
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.is_meta:
            if id(parameter) not in made:
                filled = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                made[id(parameter)] = filled
            set_parameter(model, name, made[id(parameter)])
    for group in _fsdp_groups(model) if made else ():
        for shared in group.fsdp_params:
            shared.reset_sharded_param()


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put `parameter` in the place of the one of that qualified name."""
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner).register_parameter(leaf, parameter)


def _fsdp_groups(root: nn.Module) -> list[Any]:
    """What FSDP keeps of the modules inside `root`; 2.13 keeps a list per module, earlier versions one."""
    found = []
    for module in root.modules():
        if isinstance(module, FSDPModule):
            found += _groups_of(module)
    return found


def _groups_of(module: FSDPModule) -> list[Any]:
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _shares_parameters(model: nn.Module, path: str) -> bool:
    """Whether a parameter below `path` is one outside of it as well."""
    inside: set[int] = set()
    outside: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        (inside if name.startswith(f"{path}.") else outside).add(id(parameter))
    return bool(inside & outside)


def _wrap(module: Any, mesh: Any, how: DataParallel, ignored: set[nn.Parameter]) -> None:
    if how == "replicate":
        replicate(module, mesh=mesh, ignored_params=ignored)
    elif isinstance(module, RoutedExperts) and module.num_local < mesh.size():
        # Fewer experts than replicas: a rank would have none. Their width divides well.
        fully_shard(module, mesh=mesh, shard_placement_fn=lambda parameter: Shard(1))
    else:
        fully_shard(module, mesh=mesh, ignored_params=ignored)
    if mesh.device_type != "cuda":
        # Only NCCL averages while it reduces.
        module.set_force_sum_reduction_for_comms(True)
    # After FSDP has put its own there, so that this one comes before it.
    module.register_forward_pre_hook(_reshard_what_is_left, prepend=True)


def _reshard_what_is_left(module: Any, arguments: Any) -> None:
    """Before a forward that may be trained: give up what an earlier one has gathered and no backward pass has left.

    The outermost parameters stay gathered for the backward pass that FSDP expects, replicas all of them. Where there is
    none (the module was frozen, toggled off by hand, or only evaluated) they would keep the values, and whether they
    require gradients, of that forward.
    """
    if not torch.is_grad_enabled():
        return
    for group in _groups_of(module):
        if group.is_unsharded and group._training_state is TrainingState.IDLE:
            group.reshard()


def reshard_idle(root: nn.Module) -> None:
    """After a step of an optimizer or an evaluation: give up what is still gathered.

    It would keep the values of before the step, and stand where the user's code looks for the parameters, to freeze or
    to hand to an optimizer.
    """
    for group in _fsdp_groups(root):
        if group._training_state is TrainingState.IDLE:
            group.reshard()


def owned_by_fsdp(root: nn.Module) -> list[FSDPModule]:
    """The outermost models inside `root` that are shared over data ranks."""
    found: list[FSDPModule] = []
    names: list[str] = []
    for name, module in root.named_modules():
        if isinstance(module, FSDPModule) and not any(name.startswith(f"{outer}." if outer else "") for outer in names):
            found.append(module)
            names.append(name)
    return found


def reduce_gradients(root: nn.Module, enabled: bool) -> None:
    """Whether the next backward passes reduce gradients over data ranks, or only add to what is there."""
    for module in owned_by_fsdp(root):
        module.set_requires_gradient_sync(enabled)


def reset_after_failed_step(root: nn.Module) -> None:
    """Let FSDP forget a forward or backward pass that an error ended, and its gradients: parameters are slices again.

    Before torch 2.13 there is no way to.
    """
    for module in owned_by_fsdp(root):
        if hasattr(module, "reset_iter_state"):
            module.reset_iter_state()


def rebind_groups(root: nn.Module | None) -> None:
    """Let FSDP use the process groups of now: it holds those of the process group that it was set up in."""
    for info in _mesh_infos(root):
        info.__post_init__()


def release_groups(root: nn.Module | None) -> None:
    """Let FSDP drop its process groups, which are about to be destroyed; `rebind_groups` gives it others."""
    for info in _mesh_infos(root):
        for name in ("shard_process_group", "replicate_process_group"):
            if hasattr(info, name):
                setattr(info, name, None)


def _mesh_infos(root: nn.Module | None) -> list[Any]:
    groups = [] if root is None else _fsdp_groups(root)
    infos = (info for group in groups for info in (group.mesh_info, group.post_forward_mesh_info))
    return [info for info in infos if info is not None]


@torch.no_grad()
def average_plain_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Average complete gradients of plain parameters over the data ranks, in place; one collective per dtype.

    A parameter without gradient on this rank takes part with zeros: another rank may have one.
    """
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for same in by_dtype.values():
        for parameter in same:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [local(parameter.grad) for parameter in same if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=group)
        flat.div_(dist.get_world_size(group))
        torch._foreach_copy_(
            gradients,
            [
                part.view_as(gradient)
                for part, gradient in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)
            ],
        )
