"""Turn transformers models inside any module into sharded ones, in place.

For every supported model found: check the sizes, swap the modules that compute differently, match
each parameter to its rule, and replace it by a DTensor whose local part lies on this rank's device.
Parameters on the meta device are filled from the seed and their name (`initial_weights.py`); parameters that
hold weights keep them; a model with a source (`weight_source.py`) is filled by it. Names and their order stay.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_npu_tp.convert.carry_over import OnParameter, refuse_hooks_over_data
from lightning_npu_tp.convert.data_parallel import (
    DATA_PARALLEL,
    DataParallel,
    allocate_shards,
    parallelize_over_data,
    rebind_groups,
    set_parameter,
)
from lightning_npu_tp.convert.initial_weights import initial_shard, stream_seed
from lightning_npu_tp.convert.shard_spec import ShardSpec, size_of
from lightning_npu_tp.convert.swap_modules import find_swaps, swap_modules
from lightning_npu_tp.convert.weight_source import Target, source_of
from lightning_npu_tp.errors import ConfigError, ConversionError
from lightning_npu_tp.kernels import Kernels
from lightning_npu_tp.models.families.family import BuildContext, ModelFamily
from lightning_npu_tp.models.families.registry import FAMILIES, find_models
from lightning_npu_tp.models.layers.mixins import check_parts, mix_in
from lightning_npu_tp.models.layers.sharded_causal_lm import ATTENTION_NAME
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
from lightning_npu_tp.parallel.recompute import RECOMPUTE, Recompute, has_dropout, recompute_layers
from lightning_npu_tp.parallel.tensor_region import Region
from lightning_npu_tp.parallel.tensor_region import local as local_part

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
    loaded:            what the model's source tells of its filling; None for a model without.
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
    loaded: Any = None


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
        # Of nothing, such as the channels of no shared experts, every rank has as much as there is.
        if size and start == stop:
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
    setup = _Setup(meshes, groups, kernels, options or Options(), device, dtype, seed)
    found = list(find_models(root, (*families, *FAMILIES)))
    return [_convert_one(name, model, family, setup) for name, model, family in found if not hasattr(model, _RECORD)]


@dataclass(frozen=True)
class _Setup:
    """The arguments that `convert` hands to the conversion of each model."""

    meshes: Meshes
    groups: Groups
    kernels: Kernels
    options: Options
    device: torch.device
    dtype: torch.dtype | None
    seed: int


def _convert_one(model_name: str, model: nn.Module, family: ModelFamily, setup: _Setup) -> ConversionReport:
    config, layout = getattr(model, "config", None), setup.meshes.layout
    family.check(config)
    specs = _specs(model, family, config, setup)
    swaps = find_swaps(model, family, config)
    keep_foreign = family in FAMILIES
    for path, mixin in family.mixins.items():
        check_parts(model.get_submodule(path), mixin, keep_foreign=keep_foreign)
    if layout.data > 1:
        refuse_hooks_over_data(model)

    # From here on the model changes.
    names, buffers = _names(model), model.state_dict().keys() - specs.keys()
    rules = {name: spec.rule for name, spec in specs.items()}
    report = ConversionReport(model=model_name, family=family.name, layout=layout, groups=setup.groups, rules=rules)
    context = _context(model, config, setup)
    if any(rule.axis == "expert" for rule in rules.values()):
        report.dispatch = context.dispatch
    report.swapped = swap_modules(swaps, family, context)
    for path, mixin in family.mixins.items():
        mix_in(model.get_submodule(path), mixin, keep_foreign=keep_foreign)
        _place(model.get_submodule(path), context.region, draws=has_dropout(model, config))
    left = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert left == list(specs), f"swapping changed parameters' names or their order: {left} were {list(specs)}"

    source, on_parameters = source_of(model), {}
    std = getattr(context.config, "initializer_range", 0.02)
    for first, aliases in names.items():
        parameter, spec = model.get_parameter(first), specs[first]
        on_parameters[first] = OnParameter.of(parameter)
        report.parameters += parameter.numel()
        part = _waiting_part(parameter, spec, setup) if source else _own_part(model, first, spec, setup, std)
        sharded = nn.Parameter(spec.placed(part), requires_grad=parameter.requires_grad)
        for name in aliases:
            set_parameter(model, name, sharded)
    recompute_layers(model, context.region, context.config, switch_on=setup.options.recompute == "block")
    if layout.data > 1:
        parallelize_over_data(model, family.layers, setup.meshes, setup.options.data_parallel, setup.groups)
    if source:
        allocate_shards(model, setup.device)
        targets = _targets(model, names, specs, buffers)
        report.loaded = source.fill(targets, family.keys(context.config), family=family.name)
    for first, on_parameter in on_parameters.items():
        on_parameter.put_on(model.get_parameter(first))
    for parameter in model.parameters():
        own = local_part(parameter)
        report.local_parameters += own.numel()
        report.local_bytes += own.numel() * own.element_size()
    object.__setattr__(model, _RECORD, report)
    return report


def _specs(model: nn.Module, family: ModelFamily, config: object, setup: _Setup) -> dict[str, ShardSpec]:
    """Where each parameter will lie, by name. Raises ConversionError without a rule, ConfigError for a cut unit."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    rules = match_plan(family.plan(config), shapes, family=family.name)
    layout, rank = setup.meshes.layout, setup.meshes.dense.get_rank()
    check_sizes(family, config, rules, shapes, layout)
    how = setup.options.data_parallel
    return {name: ShardSpec.of(rules[name], shapes[name], layout, rank, how, setup.meshes) for name in shapes}


def _place(module: Any, region: Region, *, draws: bool) -> None:
    """Tell a module that was mixed in, or each of a list, its region and whether its layers draw random numbers."""
    for each in (module, *(module if isinstance(module, nn.ModuleList) else ())):
        each.region, each.has_dropout = region, draws


def _names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First name of each parameter -> all its names, in the model's order: several modules may share one."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return {names[0]: tuple(names) for names in found.values()}


def _context(model: nn.Module, config: Any, setup: _Setup) -> BuildContext:
    """What constructors may use; gives the model a config of its own, as the caller's may serve another model too."""
    options, layout = setup.options, setup.meshes.layout
    dispatch, own = resolve_dispatch(layout, options.dispatch), copy.deepcopy(config)
    if own is not None:
        own._attn_implementation = ATTENTION_NAME
        for module in model.modules():
            if getattr(module, "config", None) is config:
                module.config = own
    return BuildContext(
        region=options.region(setup.groups, sequence_parallel=options.sequence_parallel and layout.tensor > 1),
        kernels=setup.kernels,
        config=own,
        dispatch=dispatch,
        recompute=options.recompute,
    )


def _waiting_part(parameter: nn.Parameter, spec: ShardSpec, setup: _Setup) -> Tensor:
    """This rank's part of a parameter that a source will fill, without values.

    FSDP would copy what it shares out, and twice the memory is what nobody has: such a part waits without memory.
    """
    device = "meta" if spec.is_shared else setup.device
    return torch.empty(size_of(spec.bounds), dtype=setup.dtype or parameter.dtype, device=device)


def _own_part(model: nn.Module, name: str, spec: ShardSpec, setup: _Setup, std: float) -> Tensor:
    """This rank's part of a parameter: initial values on meta, else of the weights that it holds.

    Rank 0's weights are everyone's: random initialisation without a seed differs from rank to rank.
    """
    full = model.get_parameter(name).detach()
    if full.is_meta:
        padding = getattr(model.get_submodule(name.rpartition(".")[0]), "padding_idx", None)
        part = initial_shard(name, spec, seed=setup.seed, std=std, zero_row=padding)
        return part.to(device=setup.device, dtype=setup.dtype or full.dtype)
    full = full.to(device=setup.device, dtype=setup.dtype or full.dtype).contiguous()
    if dist.is_initialized() and dist.get_world_size() > 1:
        full = full.clone()
        dist.broadcast(full, src=0)
    return spec.cut(full)


def _targets(
    model: nn.Module, names: dict[str, tuple[str, ...]], specs: dict[str, ShardSpec], buffers: Container[str]
) -> list[Target]:
    """Every parameter and persistent buffer, with the part of it that this rank holds.

    buffers: those that transformers' model has; files may lack the others.
    """
    targets = []
    for first, aliases in names.items():
        part, spec = local_part(model.get_parameter(first)).detach(), specs[first]
        assert part.shape == size_of(spec.held), f"{first}: {tuple(part.shape)} is not within {spec.held}"
        targets.append(Target(aliases, spec.shape, spec.held, part))
    for name, buffer in model.state_dict().items():
        if name not in specs:
            whole = tuple((0, size) for size in buffer.shape)
            targets.append(Target((name,), tuple(buffer.shape), whole, buffer, optional=name not in buffers))
    return targets


def rebind_converted(root: nn.Module, meshes: Meshes) -> list[Groups]:
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
