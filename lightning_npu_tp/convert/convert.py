"""Turn transformers models inside any module into sharded ones, in place.

For every supported model found: check the sizes, swap the modules that compute differently, match
each parameter to its rule, and replace it by a DTensor whose local part lies on this rank's device.
Parameters on the meta device are filled from the seed and their name (`initial_weights.py`); parameters that
hold weights keep them; a model that `weights_from` marked is filled from files. Names stay as they were.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_npu_tp.checkpoint.peers import Peers
from lightning_npu_tp.convert.data_parallel import (
    DATA_PARALLEL,
    DataParallel,
    allocate_shards,
    parallelize_over_data,
    rebind_groups,
    shared_by_fsdp,
)
from lightning_npu_tp.convert.initial_weights import initial_shard, stream_seed
from lightning_npu_tp.convert.shard_bounds import mesh_of, targets_of
from lightning_npu_tp.convert.swap_modules import find_swaps, swap_modules
from lightning_npu_tp.errors import ConfigError, ConversionError
from lightning_npu_tp.kernels import Kernels
from lightning_npu_tp.models.families.family import BuildContext, ModelFamily
from lightning_npu_tp.models.families.registry import FAMILIES, find_models
from lightning_npu_tp.models.layers.causal_lm import ATTENTION_NAME, become
from lightning_npu_tp.parallel.layout import (
    DISPATCH,
    Dispatch,
    Groups,
    Layout,
    Meshes,
    divisors,
    resolve_dispatch,
)
from lightning_npu_tp.parallel.plan import Rule, chunk_bounds, match_plan
from lightning_npu_tp.parallel.recompute import RECOMPUTE, Recompute, recompute_layers
from lightning_npu_tp.parallel.tensor_region import Region
from lightning_npu_tp.parallel.tensor_region import local as local_part
from lightning_npu_tp.weights.load import LoadReport, fill, is_left_to_checkpoint, marked_folder

_RECORD = "_lightning_npu_tp"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a layout is used; none of it changes what is computed.

    sequence_parallel: norms, residuals and routers run on a slice of the sequence per tensor rank.
    dispatch:          how tokens reach their experts: "auto", "replicated" or "all_to_all".
    recompute:         which activations are computed again in the backward pass: "none", "moe" (hidden ones
                       of the routed experts) or "block" (all of a decoder layer).
    data_parallel:     "shard" (FSDP2) or "replicate".
    region:            makes the Region; the proof puts one in that leaves collectives out.

    Raises ConfigError for a value that does not exist.
    """

    sequence_parallel: bool = False
    dispatch: Dispatch = "auto"
    recompute: Recompute = "none"
    data_parallel: DataParallel = "shard"
    region: Callable[..., Region] = Region

    def __post_init__(self) -> None:
        known = {"dispatch": DISPATCH, "recompute": RECOMPUTE, "data_parallel": DATA_PARALLEL}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} does not exist. Set strategy.{name} to one of {list(values)}."
                )


@dataclass
class ConversionReport:
    """What a conversion did, for the start-up summary (`trainer/start_table.py`) and for tests.

    model:             name of the converted submodule ("" for the root).
    family:            name of its family.
    swapped:           class name -> how many modules were replaced.
    parameters:        number of elements, all ranks together.
    local_parameters:  number of elements on this rank.
    local_bytes:       their bytes on this rank.
    rules:             parameter name -> rule.
    layout, groups:    what it was sharded for, and the groups that its modules use.
    dispatch:          how tokens reach their experts; "none" for a model without any.
    loaded:            what was read from files; None for a model that was not.
    """

    model: str
    family: str
    layout: Layout
    groups: Groups
    dispatch: str = "none"
    swapped: Counter[str] = field(default_factory=Counter)
    parameters: int = 0
    local_parameters: int = 0
    local_bytes: int = 0
    rules: dict[str, Rule] = field(default_factory=dict)
    loaded: LoadReport | None = None


def check_sizes(family: ModelFamily, config: object, rules: dict[str, Rule], shapes: dict, layout: Layout) -> None:
    """Raise ConfigError, naming the sizes that work, for a layout that would cut a unit.

    Heads and experts must divide; channels and vocabulary entries may split unevenly, as long as
    every rank gets some.
    """
    ranks_of = {"tensor": layout.tensor, "expert": layout.expert}
    for unit, number in family.units(config).items():
        axis = next((rule.axis for rule in rules.values() if rule.unit == unit), None)
        if axis is not None and number % ranks_of[axis]:
            raise ConfigError(
                f"{axis}_parallel_size={ranks_of[axis]} cannot split the {number} {unit}s of {family.name}. "
                f"Set strategy.{axis}_parallel_size to one of {divisors(number)}."
            )
    for name, rule in rules.items():
        if rule.dim is None:
            continue
        size, ranks = shapes[name][rule.dim], ranks_of[rule.axis]
        start, stop = chunk_bounds(size, ranks - 1, ranks)
        if start == stop:
            works = [n for n in range(1, ranks) if chunk_bounds(size, n - 1, n)[0] < size]
            raise ConfigError(
                f"{rule.axis}_parallel_size={ranks} leaves a rank without any {rule.unit} of {name} (size {size}). "
                f"Set strategy.{rule.axis}_parallel_size to one of {works}."
            )


def convert(
    root: nn.Module,
    *,
    meshes: Meshes,
    groups: Groups,
    kernels: Kernels,
    families: Sequence[ModelFamily] = (),
    device: torch.device,
    dtype: torch.dtype | None,
    seed: int,
    options: Options | None = None,
) -> list[ConversionReport]:
    """Convert every supported model inside `root` that is not converted yet.

    families: the user's own, tried before the built-in ones.
    dtype:    of the parameters; None keeps each parameter's own.
    seed:     for parameters on the meta device.
    options:  how the layout is used.

    Every rank calls it. Raises ConversionError and ConfigError before any module is changed.
    """
    reports = []
    for name, model, family in list(find_models(root, (*families, *FAMILIES))):
        if not hasattr(model, _RECORD):
            settings = (options or Options(), device, dtype, seed)
            reports.append(_convert_one(name, model, family, meshes, groups, kernels, *settings))
    return reports


def _convert_one(
    model_name: str,
    model: nn.Module,
    family: ModelFamily,
    meshes: Meshes,
    groups: Groups,
    kernels: Kernels,
    options: Options,
    device: torch.device,
    dtype: torch.dtype | None,
    seed: int,
) -> ConversionReport:
    config = getattr(model, "config", None)
    family.check(config)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    tied = _tied_names(model)
    rules = match_plan(family.plan(config), names, family=family.name)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    check_sizes(family, config, rules, shapes, meshes.layout)
    swaps = find_swaps(model, family, config)
    padding_rows = {
        f"{name}.weight" if name else "weight": module.padding_idx
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None
    }

    folder = marked_folder(model)
    own_buffers = {name for name in model.state_dict() if name not in shapes}
    own_config = _own_config(model, config)
    report = ConversionReport(model=model_name, family=family.name, layout=meshes.layout, groups=groups, rules=rules)
    region = options.region(groups, sequence_parallel=options.sequence_parallel and meshes.layout.tensor > 1)
    dispatch = resolve_dispatch(meshes.layout, options.dispatch)
    if any(rule.axis == "expert" for rule in rules.values()):
        report.dispatch = dispatch
    report.swapped = swap_modules(
        swaps,
        family,
        BuildContext(region=region, kernels=kernels, config=own_config, dispatch=dispatch, recompute=options.recompute),
    )
    for path, mixin in family.mixins.items():
        become(model.get_submodule(path), mixin)
        model.get_submodule(path).region = region  # type: ignore[assignment]
    left = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert left == set(names), f"swapping changed parameter names: {sorted(left ^ set(names))}"

    std = getattr(own_config, "initializer_range", 0.02)
    sharded: dict[str, nn.Parameter] = {}
    for name in names:
        first = tied.get(name, name)
        if first not in sharded:
            parameter = model.get_parameter(name)
            rule, mesh = rules[name], mesh_of(rules[name], meshes)
            full_shape, target = shapes[name], dtype or parameter.dtype
            if folder is not None:
                shape = rule.local_shape(full_shape, mesh.get_local_rank(), mesh.size())
                # FSDP would copy what it shares out, and twice the memory is what nobody has.
                waits = shared_by_fsdp(meshes, options.data_parallel, experts=rule.axis == "expert")
                local = torch.empty(shape, dtype=target, device="meta" if waits else device)
            elif parameter.is_meta:
                local = initial_shard(name, full_shape, rule, mesh.get_local_rank(), mesh.size(), seed=seed, std=std)
                if name in padding_rows:
                    start, stop = chunk_bounds(full_shape[0], mesh.get_local_rank(), mesh.size())
                    if start <= padding_rows[name] < stop:
                        local[padding_rows[name] - start] = 0
                local = local.to(device=device, dtype=target)
            else:
                local = _shard_of_existing(parameter.detach(), rule, mesh, device, target)
            tensor = DTensor.from_local(
                local,
                mesh,
                (rule.placement,),
                run_check=False,
                shape=torch.Size(full_shape),
                stride=_strides(full_shape),
            )
            sharded[first] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            report.parameters += parameter.numel()
        _set_parameter(model, name, sharded[first])
    if options.recompute == "block":
        recompute_layers(model, own_config)
    if meshes.layout.data > 1:
        parallelize_over_data(model, family.layers, meshes, options.data_parallel)
    if folder is not None:
        allocate_shards(model, device)
        targets = targets_of(model, names, shapes, tied, rules, meshes, own_buffers)
        only_check, keys = is_left_to_checkpoint(model), family.keys(own_config)
        report.loaded = fill(folder, targets, keys, family=family.name, peers=Peers(), only_check=only_check)
    for parameter in model.parameters():
        own = local_part(parameter)
        report.local_parameters += own.numel()
        report.local_bytes += own.numel() * own.element_size()
    object.__setattr__(model, _RECORD, report)
    return report


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(tuple(shape), device="meta").stride()


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Name -> first name of the same parameter, for parameters that several modules share."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


def _own_config(model: nn.Module, config: Any) -> Any:
    """Give the model a config of its own: the caller's object may serve another model too."""
    if config is None:
        return None
    own = copy.deepcopy(config)
    own._attn_implementation = ATTENTION_NAME
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = own
    return own


def _shard_of_existing(full: Tensor, rule: Rule, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype) -> Tensor:
    """This rank's slice of a parameter that holds weights; rank 0's weights are everyone's.

    Random initialisation without a seed differs from rank to rank, hence the broadcast.
    """
    full = full.to(device=device, dtype=dtype).contiguous()
    if dist.is_initialized() and dist.get_world_size() > 1:
        full = full.clone()
        dist.broadcast(full, src=0)
    if rule.dim is None:
        return full.clone()
    start, stop = chunk_bounds(full.shape[rule.dim], mesh.get_local_rank(), mesh.size())
    # A clone, so that the full tensor's memory goes.
    return full.narrow(rule.dim, start, stop - start).clone(memory_format=torch.contiguous_format)


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner).register_parameter(leaf, parameter)


def adopt(root: nn.Module, meshes: Meshes) -> list[Groups]:
    """Let models that an earlier trainer call converted use the process groups of `meshes`.

    Their parameters' meshes name the groups; the groups that a new process group of the same layout
    creates have the same names and ranks. Returns what to close when the process group goes.
    Raises ConversionError when the layout is another one.
    """
    adopted: list[Groups] = []
    for name, module in root.named_modules():
        report = conversion_of(module)
        if report is None:
            continue
        if report.layout != meshes.layout:
            raise ConversionError(
                f"The model {name or 'root'!r} was sharded for {report.layout}, but this run has {meshes.layout}. "
                f"Build it anew and load a checkpoint: checkpoints load into any layout."
            )
        report.groups.bind(meshes)
        rebind_groups(module)
        adopted.append(report.groups)
    return adopted


def conversion_of(model: nn.Module) -> ConversionReport | None:
    """The report of the conversion that made `model` what it is, or None."""
    return getattr(model, _RECORD, None)


def materialize_rest(root: nn.Module, *, device: torch.device, seed: int) -> None:
    """Give memory and initial values to what is still on the meta device after conversion.

    Module by module, and only those that are wholly on meta: a module that holds loaded weights is
    never emptied. Its own `reset_parameters` fills it, under a seed of its name, so that all ranks
    agree. Raises ConversionError for a module that cannot fill itself.
    """
    for name, module in root.named_modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        on_meta = [tensor for tensor in tensors if tensor.is_meta]
        if not on_meta:
            continue
        reset = getattr(module, "reset_parameters", None)
        if len(on_meta) < len(tensors) or not callable(reset):
            reason = "has no reset_parameters()" if not callable(reset) else "is only partly on the meta device"
            raise ConversionError(
                f"The module {name or 'root'!r} ({type(module).__name__}) is on the meta device and {reason}, so "
                f"nothing says what its values are. Build it outside of torch.device('meta'), or give it a "
                f"reset_parameters() method."
            )
        module.to_empty(device=device, recurse=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, name))
            reset()
