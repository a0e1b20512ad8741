"""The proof behind `lightning-npu-tp prove`: a layout computes what one process computes.

The user's model, made small (`small_model.py`), trains a few AdamW steps in as many processes as the layout has
ranks, on the CPU or on cards, and once in this process as transformers' own float64 model. Every number
of every rank is compared, for each kind of batch by itself (`proof_batches.py`) and in training; gradients and
parameters are told by the sharding rule that they fall under. A checkpoint is loaded into another layout too.
Knows no command line and prints nothing.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
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
from lightning_npu_tp.tools.proof import Check, Proof, Worst
from lightning_npu_tp.tools.proof_batches import (
    answers_alone,
    expert_counts,
    kind_batches,
    not_compared,
    paths_of,
    set_balance_losses,
    uneven_batches,
)
from lightning_npu_tp.tools.small_model import config_with_few_layers, shrink
from lightning_npu_tp.tools.testing.breaking import BrokenRegion
from lightning_npu_tp.tools.testing.models import BatchAnswer, ReferenceStep
from lightning_npu_tp.tools.testing.ranks import run_ranks
from lightning_npu_tp.tools.testing.reference import relative_difference
from lightning_npu_tp.tools.testing.sharded import (
    CPU,
    ShardedRun,
    Training,
    compare,
    compare_kind,
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


@dataclass(frozen=True)
class Problem:
    """A small model and one process's answer; any layout that divides the same numbers may be held against it.

    expected, counts, kinds: what one process computes: the training, picks by layer and expert (None without
                             experts), and each batch of `training.kinds`.
    """

    plan: Plan
    training: Training
    expected: ReferenceStep
    counts: Tensor | None
    kinds: Mapping[str, BatchAnswer]

    @classmethod
    def of(
        cls, small: Any, layout: Layout, *, families: Sequence[ModelFamily] = (), steps: int = 3, reshard: bool = False
    ) -> Problem:
        """small: config from `shrink`; the batches are uneven for `layout`. reshard: see `Training`."""
        plan = plan_of(small, families)
        batches = uneven_batches(small, layout)
        counts = expert_counts(small, batches)
        # Over several data ranks the loss of all tokens at once is not one process's.
        balance = counts is not None and (layout.data == 1 or getattr(small, "seq_aux", True))
        if balance:
            set_balance_losses(small)
        training = Training(
            config=small,
            batches=batches,
            kinds=kind_batches(small, layout, balance=balance),
            steps=steps,
            clip_norm=_CLIP_NORM,
            reshard=reshard,
        )
        kinds = answers_alone(small, plan.family, training.kinds)
        return cls(plan, training, train_alone(training), counts, kinds)


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
    try:
        run = train_sharded(rank, world_size, training, layout, options, device=device, **more)
    finally:
        for region in made:
            region.close()
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
    for kind, batch in training.kinds.items():
        checks.append(Check(kind, " x ".join(map(str, batch["input_ids"].shape))))
    splits = {problem.plan.patterns[name]: rule for name, rule in problem.plan.rules.items()}
    checks += [Check(pattern, _split_text(splits[pattern]), after=Worst()) for pattern in patterns]
    rows = {check.name: check for check in checks}
    for rank, (found, _) in enumerate(results):
        _fill(rows, rank, found, problem)
        _fill_kinds(rows, rank, found, problem, layout, options)
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
    """Add a rank's differences of the training run to the rows of the proof."""
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


def _fill_kinds(
    rows: dict[str, Check], rank: int, found: ShardedRun, problem: Problem, layout: Layout, options: Options
) -> None:
    """Add a rank's differences of each kind of batch to its row, infinite where it took another path than its own."""
    # A family of the user's may attend by itself; what it does then is not seen.
    is_seen = any(answer.paths & {"causal", "masked"} for answer in found.kinds.values())
    for kind, batch in problem.training.kinds.items():
        answer = found.kinds[kind]
        differences = compare_kind(answer, problem.kinds[kind], batch, rank // layout.tensor, layout.data)
        for name, difference in differences.items():
            rows[kind].gradient |= Worst(difference, f"{name} on rank {rank}")
        asked = paths_of(kind, layout, options)
        if is_seen and answer.paths != asked:
            never = f"{', '.join(sorted(answer.paths))} instead of {', '.join(sorted(asked))} on rank {rank}"
            rows[kind].gradient |= Worst(math.inf, never)


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
    proof = examine(
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
    proof.not_compared = not_compared(config, layout)
    return proof
