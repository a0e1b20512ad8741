"""What would have fitted: bytes of one rank by layout, batch, length and recompute, and the nearest that fits.

Pure arithmetic, no device. Weights, gradients and optimizer states come from the plan (`step_memory.py`, exact). With
the fused kernels of an NPU the peak of a whole step does too (`step_peak`); elsewhere activations are counted
tensor by tensor as the layers keep them for the backward pass. Either is raised to what the run was seen to hold if
that was more. Kernels' workspaces are not known here, so the figures are told as "about".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_npu_tp.convert.data_parallel import DataParallel
from lightning_npu_tp.estimates.layer_memory import Shape
from lightning_npu_tp.estimates.model_sizes import ModelSizes
from lightning_npu_tp.estimates.step_memory import Model, RankMemory, rank_memory, step_peak
from lightning_npu_tp.parallel.layout import Layout, divisors
from lightning_npu_tp.parallel.plan import Rule
from lightning_npu_tp.parallel.recompute import Recompute

# Allocators round up and leave gaps.
_USABLE = 0.95
_MOST_TIMES_THE_DEVICES = 64
_SHORTEST = 64
_UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
# From a number's first digit on alone, as each would be looked at to the end of a long one.
_SIZE = r"(?<![\d.])(\d{1,16}(?:\.\d{1,9})?) (bytes|[KMGT]?i?B)"


@dataclass(frozen=True, kw_only=True)
class Told:
    """Bytes that an out-of-memory text holds; None where it says nothing.

    total:     of the device; free: of the device, of all processes.
    allocated: in tensors of this process; reserved: by this process's allocator, allocated bytes included.
    """

    requested: int | None = None
    total: int | None = None
    free: int | None = None
    allocated: int | None = None
    reserved: int | None = None

    @property
    def usable(self) -> int | None:
        """What tensors of this process could take: the device without what others hold."""
        if self.total is None or self.free is None or self.reserved is None:
            return self.total
        return self.free + self.reserved

    @property
    def in_pieces(self) -> bool:
        """Whether the allocator's own cache would have been enough, had it been in one piece."""
        if self.requested is None or self.reserved is None or self.allocated is None:
            return False
        return self.reserved - self.allocated >= self.requested


def read_numbers(text: str) -> Told:
    """The sizes in an out-of-memory text of torch_npu or of torch's CUDA allocator."""

    def size(*patterns: str) -> int | None:
        for pattern in patterns:
            if match := re.search(pattern.format(size=_SIZE), text):
                return int(float(match.group(1)) * _UNITS.get(match.group(2), 1))
        return None

    allocated = size("{size} already allocated", "{size} is allocated by PyTorch")
    reserved, cached = size("{size} reserved in total"), size("{size} is reserved by PyTorch but unallocated")
    if reserved is None and allocated is not None and cached is not None:
        reserved = allocated + cached
    return Told(
        requested=size("Tried to allocate {size}"),
        total=size("{size} total capacity", "total capacity of {size}"),
        free=size("{size} free", "of which {size} is free"),
        allocated=allocated,
        reserved=reserved,
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """What decides how much memory a rank needs.

    shapes, rules:     global shapes of the parameters and their sharding rules, by name.
    units:             {unit: number} that a split must not cut.
    batch, length:     sequences of a data rank's micro-batch, and tokens of each.
    bytes_per_element: of parameters; activation_bytes: of what layers compute in.
    accumulates:       whether a step sums gradients of several micro-batches; they stay whole until the last.
    all_to_all:        whether rows travel though the layout would not ask for it.
    fused:             operations that torch_npu's fused kernels compute (`layer_memory.fused_by`).
    seen:              bytes of activations that the run was seen to hold; it had not got to its end.
    """

    sizes: ModelSizes
    shapes: Mapping[str, tuple[int, ...]]
    rules: Mapping[str, Rule]
    units: Mapping[str, int]
    layout: Layout
    batch: int
    length: int
    bytes_per_element: int = 4
    activation_bytes: int = 4
    optimizer_states: int = 2
    data_parallel: DataParallel = "shard"
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    accumulates: bool = False
    all_to_all: bool = False
    fused: frozenset[str] = frozenset()
    seen: int = 0


# As many tensors of the parameter's two bytes as its state, the remainder among them, takes by dtype of the moments.
_STATES_OF_ADAMW_BF16 = {"float32": 5, "bfloat16": 3}


def needed(run: Run) -> int:
    """Bytes of the fullest rank at the peak of a training step."""
    return _predicted(run, run)


def kept_for_the_run(run: Run) -> int:
    """Weights, gradients and optimizer states of rank 0, which never holds less than another rank."""
    return _memory(run, run.shapes, run.data_parallel).total_bytes


def layer_bytes(run: Run, *, sparse: bool, recompute: Recompute) -> int:
    """What the backward pass of one decoder layer needs, kept from its forward pass."""
    sizes, tensor, unit = run.sizes, run.layout.tensor, run.activation_bytes
    whole = run.batch * run.length
    outside = -(-whole // tensor) if run.sequence_parallel else whole
    if recompute == "block":
        return unit * outside * sizes.hidden
    # A norm keeps its input in float32 and the result before the weight; the result enters the region.
    norms = 2 * outside * sizes.hidden * (4 + unit)
    entered = 2 * unit * whole * sizes.hidden
    latents = whole * (sizes.kv_latent + sizes.q_latent) * (4 + 2 * unit)
    attention = unit * whole * (sizes.heads // tensor) * 2 * (sizes.key_dim + sizes.value_dim)
    result = 2 * unit * outside * sizes.hidden
    total = norms + entered + latents + attention + result
    if not sparse:
        return total + unit * whole * 4 * sizes.dense_width // tensor
    rows = whole * sizes.picks
    total += unit * whole * 4 * sizes.shared_width // tensor
    total += outside * sizes.hidden * 4 + (0 if run.sequence_parallel else whole * 3 * sizes.experts * 4)
    if recompute == "moe":
        return total
    return total + 2 * unit * rows * sizes.hidden + unit * rows * 4 * sizes.expert_width


def activations(run: Run) -> int:
    """Bytes at the peak beside what stays: what all layers keep, and one layer at work."""
    if run.fused:
        return max(0, _step(run) - kept_for_the_run(run))
    sizes = run.sizes
    dense = sizes.layers - sizes.sparse_layers
    kept = dense * layer_bytes(run, sparse=False, recompute=run.recompute)
    kept += sizes.sparse_layers * layer_bytes(run, sparse=True, recompute=run.recompute)
    at_work = layer_bytes(run, sparse=bool(sizes.sparse_layers), recompute="none")
    # Half of a layer for gradients on their way; what is recomputed comes back whole first.
    return kept + int(at_work * (0.5 if run.recompute == "none" else 1.5))


def _step(run: Run) -> int:
    """Peak of a step with fused kernels; gathered parameters are in it."""
    shape = Shape(
        sizes=run.sizes,
        layout=run.layout,
        batch=run.batch,
        length=run.length,
        unit=run.activation_bytes,
        sequence_parallel=run.sequence_parallel,
        all_to_all=run.all_to_all or run.layout.expert != run.layout.tensor,
        fused=run.fused,
    )
    model = Model(
        shapes=run.shapes,
        rules=run.rules,
        bytes_per_element=run.bytes_per_element,
        optimizer_states=run.optimizer_states,
        data_parallel=run.data_parallel,
    )
    return step_peak(model, shape, recompute=run.recompute, accumulates=run.accumulates).bytes


def suggestions(run: Run, usable: int) -> list[str]:
    """Settings that would fit into `usable` bytes, each alone, the smallest change first, with what it needs.

    Fewer sequences in a forward pass and other layouts are such that a step still sees the same ones.

    usable: bytes of the device for this process.
    """
    limit = int(usable * _USABLE)
    found = []
    # Parts of the same size, so that a step sees what it saw.
    fewer = (replace(run, batch=run.batch // parts, accumulates=True) for parts in divisors(run.batch) if parts > 1)
    if smaller := next((other for other in fewer if _predicted(run, other) <= limit), None):
        times = run.batch // smaller.batch
        found.append(
            f"data.batch_size={smaller.batch} with trainer.accumulate_grad_batches={times} times what it is"
            f"{_about(run, smaller)}"
        )
    for recompute in _more_recompute(run):
        if _predicted(run, replace(run, recompute=recompute)) <= limit:
            found.append(f"strategy.recompute={recompute}{_about(run, replace(run, recompute=recompute))}")
            break
    shorter = run.length // 2
    while shorter >= _SHORTEST and _predicted(run, replace(run, length=shorter)) > limit:
        shorter //= 2
    if shorter >= _SHORTEST:
        found.append(f"data.sequence_length={shorter}{_about(run, replace(run, length=shorter))}")
    if layout := _fitting_layout(run, limit):
        sizes = f"{layout.layout.data}, {layout.layout.tensor} and {layout.layout.expert}"
        devices = "" if layout.layout.world == run.layout.world else f" on {layout.layout.world} devices"
        batch = "" if layout.batch == run.batch else f" with data.batch_size={layout.batch}"
        found.append(f"strategy's data, tensor and expert_parallel_size={sizes}{devices}{batch}{_about(run, layout)}")
    if run.bytes_per_element == 4:
        for moments, states in _STATES_OF_ADAMW_BF16.items():
            narrow = replace(run, bytes_per_element=2, activation_bytes=2, optimizer_states=states)
            if _predicted(run, narrow) <= limit:
                setting = "trainer.precision=bf16-true with optimizer=adamw_bf16"
                found.append(f"{setting} and optimizer.moments={moments}{_about(run, narrow)}")
                break
    return found


def _predicted(seen_in: Run, run: Run) -> int:
    return kept_for_the_run(run) + _gathered(run) + _activations_at_least_as_seen(seen_in, run)


def _activations_at_least_as_seen(seen_in: Run, run: Run) -> int:
    """The arithmetic for `run`, raised by as much as `seen_in` was seen to exceed it."""
    counted = activations(seen_in)
    return int(activations(run) * max(1.0, seen_in.seen / counted)) if counted else seen_in.seen


def _gathered(run: Run) -> int:
    """What FSDP holds beside this rank's own: parameters, and gradients that wait for other micro-batches.

    Of slices one layer is gathered, twice: the layer at work and the next one. Replicas are copied whole.
    """
    if run.fused or run.layout.data == 1:
        return 0
    # Experts that no other rank holds stay where they are.
    shapes = {n: s for n, s in run.shapes.items() if run.layout.expert_replicas > 1 or run.rules[n].axis != "expert"}
    whole: dict[str, int] = {}
    for name, shape in shapes.items():
        match = re.match(r".*layers\.\d+\.", name)
        layer = match.group(0) if match else "around the layers"
        whole[layer] = whole.get(layer, 0) + _memory(run, {name: shape}, "replicate").parameter_bytes
    if run.data_parallel == "replicate":
        return sum(whole.values())
    waiting = sum(whole.values()) - _memory(run, shapes, "shard").gradient_bytes if run.accumulates else 0
    return 2 * max(whole.values()) + waiting


def _memory(run: Run, shapes: Mapping[str, tuple[int, ...]], data_parallel: DataParallel) -> RankMemory:
    return rank_memory(
        shapes,
        run.rules,
        run.layout,
        bytes_per_element=run.bytes_per_element,
        optimizer_states=run.optimizer_states,
        data_parallel=data_parallel,
    )


def _about(seen_in: Run, run: Run) -> str:
    return f" (about {in_words(_predicted(seen_in, run))})"


def _more_recompute(run: Run) -> tuple[Recompute, ...]:
    if run.recompute == "none":
        return ("moe", "block") if run.sizes.sparse_layers else ("block",)
    return ("block",) if run.recompute == "moe" else ()


def _fitting_layout(run: Run, limit: int) -> Run | None:
    """The layout with the fewest devices that fits, of those the one with the fewest tensor and expert ranks.

    Its data ranks share the sequences that a step has now.
    """
    times, sequences = 1, run.batch * run.layout.data
    while times <= _MOST_TIMES_THE_DEVICES:
        for layout in _layouts(run, run.layout.world * times):
            other = replace(run, layout=layout, batch=sequences // layout.data)
            if sequences % layout.data == 0 and _predicted(run, other) <= limit:
                return other
        times *= 2
    return None


def _layouts(run: Run, world: int) -> Iterator[Layout]:
    heads = min((number for unit, number in run.units.items() if unit.endswith("head")), default=1)
    experts = run.units.get("expert", 0)
    for tensor in divisors(world):
        for expert in divisors(world) if experts else [tensor]:
            fits = heads % tensor == 0 and expert % tensor == 0 and (not experts or experts % expert == 0)
            layout = Layout(data=world // tensor, tensor=tensor, expert=expert)
            if fits and layout != run.layout:
                yield layout


def in_words(number: int) -> str:
    """Bytes for people: 61.3 GiB, 4.0 MiB."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def sizes_of(config: Any) -> ModelSizes | None:
    """ModelSizes of a config; None for a family of the user's own whose config says them otherwise."""
    try:
        return ModelSizes.of(config)
    except (AttributeError, TypeError):
        return None
