"""The proof behind `lightning-npu-tp prove`: a layout computes what one process computes.

The user's model, made small (`small_model.py`), trains a few AdamW steps in as many processes as the layout has
ranks, on the CPU or on cards, and once in this process as transformers' own float64 model. Every number
of every rank is compared; gradients and parameters are told by the sharding rule that they fall under.
Knows no command line and prints nothing. A checkpoint is loaded into another layout too. Balance losses,
which transformers does not compute, are not compared.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_npu_tp.convert.convert import Options, check_sizes
from lightning_npu_tp.devices.device import supported_precisions
from lightning_npu_tp.errors import ConfigError, ConversionError
from lightning_npu_tp.models.families.family import ModelFamily
from lightning_npu_tp.models.families.registry import FAMILIES, family_named
from lightning_npu_tp.parallel.layout import Layout, resolve_dispatch
from lightning_npu_tp.parallel.plan import Rule, match_plan
from lightning_npu_tp.tools.small_model import config_with_few_layers, shrink
from lightning_npu_tp.tools.testing.breaking import BrokenRegion
from lightning_npu_tp.tools.testing.models import ReferenceStep, random_batch, reference_model
from lightning_npu_tp.tools.testing.ranks import run_ranks
from lightning_npu_tp.tools.testing.reference import float64_reference, relative_difference
from lightning_npu_tp.tools.testing.sharded import (
    CPU,
    ShardedRun,
    Training,
    compare,
    open_group,
    train_alone,
    train_sharded,
)

# float64: additions in another order, a few thousand per element, leave 1e-13; a real mistake 1e-3 and more.
# float32: the ranks round 6e-8 per operation and the one process does not; 1e-6 was seen for gradients and 3e-5 for
# parameters, since AdamW divides small gradients by their own size. A broken rule shows by 1e-2 somewhere, but not in
# each number: what is proven in float32 only is proven less.
BOUNDS = {"float64": 1e-10, "float32": 1e-3}
_CLIP_NORM = 0.05
_DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Worst:
    """The largest relative difference of several, and where it is."""

    difference: float = 0.0
    where: str = ""

    def __or__(self, other: Worst) -> Worst:
        return other if other.difference > self.difference or not self.where else self


@dataclass
class Check:
    """One row of the proof.

    name:     "loss", "logits", "clip norm", "expert counts", or the pattern of a sharding rule.
    split:    how the rule splits, "" for the others.
    gradient: worst gradient of the rule's parameters; for the others the number itself.
    after:    worst parameter of the rule after the last step; None for the others.
    """

    name: str
    split: str = ""
    gradient: Worst = field(default_factory=Worst)
    after: Worst | None = None

    @property
    def worst(self) -> Worst:
        """The worse of the two."""
        return self.gradient | self.after if self.after is not None else self.gradient

    def passed(self, bound: float) -> bool:
        """Whether all differences are within the bound."""
        return self.worst.difference <= bound


@dataclass
class Proof:
    """What was compared and how far it was off.

    config: of the small model. left_out: how many collectives a broken rule was spared, on all ranks.
    """

    family: str
    layout: Layout
    options: Options
    config: Any
    bound: float
    dtype: str
    device: str
    steps: int
    checks: list[Check]
    left_out: int = 0

    @property
    def failed(self) -> list[Check]:
        """Checks beyond the bound."""
        return [check for check in self.checks if not check.passed(self.bound)]

    @property
    def worst(self) -> Worst:
        """The worst of all."""
        worst = Worst()
        for check in self.checks:
            worst |= check.worst
        return worst

    def headline(self) -> str:
        """The verdict in one line."""
        worst = f"worst {self.worst.difference:.1e}, bound {self.bound:.0e}"
        if not self.failed:
            return f"any number: {worst}: the layout computes what one process computes"
        return (
            f"{len(self.failed)} of {len(self.checks)} checks fail, {worst} ({self.worst.where}): "
            f"the layout does not compute what one process computes"
        )

    def as_json(self) -> dict[str, Any]:
        """The proof as plain data; numbers that are not finite are texts."""
        sizes = self.layout
        return {
            "family": self.family,
            "layout": {"data": sizes.data, "tensor": sizes.tensor, "expert": sizes.expert},
            "sequence_parallel": self.options.sequence_parallel,
            "dispatch": resolve_dispatch(sizes, self.options.dispatch),
            "recompute": self.options.recompute,
            "data_parallel": self.options.data_parallel,
            "dtype": self.dtype,
            "device": self.device,
            "steps": self.steps,
            "bound": self.bound,
            "passed": not self.failed,
            "headline": self.headline(),
            "checks": [_check_as_json(check, self.bound) for check in self.checks],
        }


def _check_as_json(check: Check, bound: float) -> dict[str, Any]:
    def plain(worst: Worst) -> dict[str, Any]:
        value = worst.difference
        return {"difference": value if math.isfinite(value) else str(value), "where": worst.where}

    found: dict[str, Any] = {"name": check.name, "split": check.split, "passed": check.passed(bound)}
    if check.after is None:
        return {**found, "value": plain(check.gradient)}
    return {**found, "gradient": plain(check.gradient), "after": plain(check.after)}


@dataclass(frozen=True)
class Plan:
    """A model's family and what its plan says of each parameter: rule, pattern, global shape, by name."""

    family: ModelFamily
    rules: Mapping[str, Rule]
    patterns: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


def plan_of(config: Any, families: Sequence[ModelFamily] = ()) -> Plan:
    """The plan of the model that transformers builds from this config; takes no memory.

    Raises ConversionError for a model that no family converts, or a plan that does not fit it.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ConversionError(f"transformers builds no causal language model from this config: {error}") from error
    family = next((family for family in (*families, *FAMILIES) if family.matches(model)), None)
    if family is None:
        family = family_named(str(config.model_type), families)
    family.check(config)
    table = family.plan(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    rules = match_plan(table, shapes, family=family.name)
    patterns = {name: next(pattern for pattern in table if fnmatchcase(name, pattern)) for name in shapes}
    return Plan(family, rules, patterns, shapes)


def check_layout(config: Any, layout: Layout, families: Sequence[ModelFamily] = ()) -> None:
    """Raise ConfigError, with the sizes that work, for a layout that cannot split the model; the same as training."""
    few = config_with_few_layers(config, families)
    plan = plan_of(few, families)
    check_sizes(plan.family, few, dict(plan.rules), dict(plan.shapes), layout)


def uneven_batches(config: Any, layout: Layout) -> list[dict[str, Tensor]]:
    """Two micro-batches that nothing divides.

    Sequences by the data ranks, lengths by the tensor ranks; other lengths in the second; rows end early.
    """
    rows = max(3, 2 * layout.data - 1)
    # Prime; a layout of so many tensor ranks takes the next.
    length = next(n for n in (17, 19, 37, 67, 131) if n > max(rows + 2, 2 * layout.tensor))
    return [random_batch(config, rows, length + 4 * index, seed=index, padding=True) for index in range(2)]


def expert_counts(config: Any, batches: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
    """Picks by layer and expert, int64 [layers, experts], of transformers' own router; None without experts."""
    model = reference_model(config)
    counts: dict[str, Tensor] = {}

    def count(name: str, number: int, _: Any, arguments: tuple[Any, ...]) -> None:
        counts[name] = counts.get(name, 0) + torch.bincount(arguments[1].reshape(-1), minlength=number)

    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts"):
            number = module.get_parameter("down_proj").shape[0]
            module.register_forward_pre_hook(partial(count, name, number))
    with float64_reference(), torch.no_grad():
        for batch in batches:
            model(input_ids=batch["input_ids"], attention_mask=_causal_mask(batch))
    return torch.stack(list(counts.values())) if counts else None


def _causal_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """What to add to attention scores [B, 1, S, S]; a padding token sees itself too.

    Padding is routed and counted as well, and what transformers lets it see differs between its attention
    functions.
    """
    seen_BS = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    itself_SS = torch.eye(seen_BS.shape[1], dtype=torch.bool)
    allowed_BSS = (seen_BS[:, None, :] & torch.ones_like(itself_SS).tril()) | itself_SS
    return torch.zeros(allowed_BSS.shape, dtype=torch.float64).masked_fill(~allowed_BSS, float("-inf"))[:, None]


@dataclass(frozen=True)
class Problem:
    """A small model and one process's answer; any layout that divides the same numbers may be held against it."""

    plan: Plan
    training: Training
    expected: ReferenceStep
    counts: Tensor | None

    @classmethod
    def of(
        cls, small: Any, layout: Layout, *, families: Sequence[ModelFamily] = (), steps: int = 3, reshard: bool = False
    ) -> Problem:
        """small: config from `shrink`; the batches are uneven for `layout`. reshard: see `Training`."""
        batches = uneven_batches(small, layout)
        training = Training(config=small, batches=batches, steps=steps, clip_norm=_CLIP_NORM, reshard=reshard)
        expected = train_alone(training)
        return cls(plan_of(small, families), training, expected, expert_counts(small, training.batches))


def load_families(names: Sequence[str]) -> list[ModelFamily]:
    """The user's families, each as "package.module:NAME". Raises ConfigError for one that is not there."""
    found = []
    for name in names:
        module, _, attribute = name.partition(":")
        try:
            family = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"--families {name} cannot be imported: {error}. Write it as package.module:NAME."
            ) from error
        if not isinstance(family, ModelFamily):
            raise ConfigError(f"--families {name} is a {type(family).__name__}. Name a ModelFamily.")
        found.append(family)
    return found


def run_rank(
    rank: int,
    world_size: int,
    training: Training,
    layout: Layout,
    options: Options,
    dtype: str,
    families: Sequence[str],
    broken: str | None,
    *,
    device: torch.device = CPU,
) -> tuple[ShardedRun, int]:
    """One rank's run, and how many of its collectives were left out."""
    made: list[BrokenRegion] = []

    def broken_region(*args: Any, **kwargs: Any) -> BrokenRegion:
        made.append(BrokenRegion(*args, **kwargs, pattern=broken or ""))
        return made[-1]

    if broken is not None:
        options = replace(options, region=broken_region)
    more: dict[str, Any] = {}
    if dtype != "float64":
        more["dtype"] = _DTYPES[dtype]
    if families:
        more["families"] = load_families(families)
    run = train_sharded(rank, world_size, training, layout, options, device=device, **more)
    return run, sum(region.num_left_out for region in made)


def widest(device_type: str) -> str:
    """The key of BOUNDS that proves most on the device."""
    return "float64" if "64-true" in supported_precisions(device_type) else "float32"


def start_rank(rank: int, world_size: int, device_type: str, timeout: float, *arguments: Any) -> tuple[ShardedRun, int]:
    """Start the process group of `device_type`, then `run_rank` with the rest of the arguments."""
    return run_rank(rank, world_size, *arguments, device=open_group(device_type, rank, timeout))


def examine(
    problem: Problem,
    layout: Layout,
    options: Options,
    *,
    dtype: str = "float64",
    families: Sequence[str] = (),
    broken: str | None = None,
    device: str = "cpu",
    run: Callable[..., list[Any]] = run_ranks,
    timeout: float = 600.0,
) -> Proof:
    """Hold a layout against one process's answer; arguments as `prove`."""
    patterns = list(dict.fromkeys(problem.plan.patterns.values()))
    if broken is not None and broken not in patterns:
        raise ConfigError(f"--break {broken} is not a rule of this model's plan. Use one of {', '.join(patterns)}.")
    training = problem.training
    arguments = (training, layout, options, dtype, list(families), broken)
    # The group's own time-out comes after the call's, which says where each rank stands.
    results = run(start_rank, layout.world, device, timeout + 10, *arguments, timeout=timeout, backend=None)
    checks = [Check(name) for name in ("loss", "logits", "clip norm")]
    if problem.counts is not None:
        checks.append(Check("expert counts"))
    if training.reshard:
        checks.append(Check("save, reshard, load"))
    splits = {problem.plan.patterns[name]: rule for name, rule in problem.plan.rules.items()}
    checks += [Check(pattern, _split_text(splits[pattern]), after=Worst()) for pattern in patterns]
    rows = {check.name: check for check in checks}
    for rank, (found, _) in enumerate(results):
        _fill(rows, rank, found, problem)
    proof = Proof(
        family=problem.plan.family.name,
        layout=layout,
        options=options,
        config=training.config,
        bound=BOUNDS[dtype],
        dtype=dtype,
        device=device,
        steps=training.steps,
        checks=checks,
        left_out=sum(number for _, number in results),
    )
    if broken is not None and not proof.left_out:
        other = "without" if options.sequence_parallel else "with"
        raise ConfigError(
            f"--break {broken} changes nothing: in this layout no collective of the tensor ranks serves the rule. "
            f"Try {other} --sequence-parallel, or more than one tensor rank."
        )
    return proof


def _fill(rows: dict[str, Check], rank: int, found: ShardedRun, problem: Problem) -> None:
    """Add a rank's differences to the rows."""
    differences = compare(found, problem.expected, problem.training)
    steps = problem.training.steps
    for name, pattern in problem.plan.patterns.items():
        if f"gradient of {name}" not in differences:
            # Tied to a parameter of another name, which has the gradient.
            continue
        row = rows[pattern]
        row.gradient |= Worst(differences.pop(f"gradient of {name}"), name)
        row.after = (row.after or Worst()) | Worst(differences.pop(f"{name} after {steps} steps"), name)
    for name, difference in differences.items():
        rows[next(row for row in ("loss", "logits", "clip norm") if name.startswith(row))].gradient |= Worst(
            difference, f"{name} on rank {rank}"
        )
    if found.resharded is not None:
        difference, what = found.resharded
        rows["save, reshard, load"].gradient |= Worst(difference, f"{what} on rank {rank}")
    if problem.counts is not None:
        assert found.tokens_per_expert is not None
        counted = found.tokens_per_expert.reshape(problem.counts.shape)
        rows["expert counts"].gradient |= Worst(relative_difference(counted, problem.counts), f"on rank {rank}")


def _split_text(rule: Rule) -> str:
    if rule.dim is None:
        return "replicated"
    return f"dim {rule.dim}, {rule.axis} ranks"


def prove(
    config: Any,
    layout: Layout,
    options: Options | None = None,
    *,
    dtype: str = "float64",
    families: Sequence[str] = (),
    broken: str | None = None,
    device: str = "cpu",
    steps: int = 3,
    run: Callable[..., list[Any]] = run_ranks,
    timeout: float = 600.0,
) -> Proof:
    """Shrink the model of `config` and hold `layout` against one process.

    dtype:    of the ranks' parameters and arithmetic, a key of BOUNDS; one process always computes in float64.
    families: the user's own, as "package.module:NAME"; each rank imports them.
    device:   type of the ranks' devices, as many as the layout has ranks; their fused kernels are used.
    broken:   pattern of a sharding rule whose collectives are left out.
    run:      starts the ranks, as `run_ranks`.
    timeout:  seconds for the ranks.

    Raises ConfigError and ConversionError as training would, and ConfigError for a broken rule without
    collectives; RankFailure and RankTimeout from the ranks.
    """
    if dtype not in BOUNDS:
        raise ConfigError(f"--dtype {dtype} cannot be proven. Use one of {list(BOUNDS)}.")
    if dtype == "float64" and widest(device) != dtype:
        raise ConfigError(f"--dtype {dtype} cannot be computed on {device}. Use --dtype {widest(device)}.")
    options = options or Options()
    resolve_dispatch(layout, options.dispatch)
    own = load_families(families)
    check_layout(config, layout, own)
    problem = Problem.of(shrink(config, layout, own), layout, families=own, steps=steps, reshard=broken is None)
    return examine(
        problem,
        layout,
        options,
        dtype=dtype,
        families=families,
        broken=broken,
        device=device,
        run=run,
        timeout=timeout,
    )
