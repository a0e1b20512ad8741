"""Bytes per rank: pure arithmetic over the plan and the shapes, no device and no weights needed.

`rank_memory` counts what stays for the whole run: parameters, gradients and optimizer states. `step_peak` walks
through one training step as the trainer does it (forward pass with the last step's gradients still there, backward
pass, optimizer) and adds what layers keep (`activations.py`), what data parallelism gathers and what the optimizer
needs while it updates. Not counted: an allocator's rounding of activations, workspaces of kernels, and buffers of
HCCL, which no allocator of torch sees.
"""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

from lightning_npu_tp.activations import CAUSAL_MASK, Row, Shape, head, layer_rows, most_backward, most_forward
from lightning_npu_tp.data_parallel import DataParallel
from lightning_npu_tp.layout import Layout
from lightning_npu_tp.plan import Rule, chunk_bounds
from lightning_npu_tp.recompute import Recompute


@dataclass(frozen=True)
class RankMemory:
    """What one rank holds. Counts are elements, the rest bytes."""

    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        """Parameters, gradients and optimizer states together."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes


_MIB = 2**20


# Of a pool's pieces, which blocks of 1 to 10 MiB are cut from; larger ones get a piece of their own.
_PIECE, _LARGE = 20 * _MIB, 10 * _MIB
# What torch_npu adds to a tensor; CUDA's allocator, the same otherwise, adds nothing.
_PADDING = 32


def blocks(sizes: Iterable[int]) -> int:
    """Bytes that torch's caching allocators count for tensors of these sizes, made one after the other.

    A block above 1 MiB is the smallest free rest that fits, or cut from a new piece; what is left of it is free for
    the next where it exceeds 1 MiB, and stays with the block where not.
    """
    total = 0
    free: list[int] = []
    for size in sizes:
        wanted = -(-(size + _PADDING) // 512) * 512
        if wanted > _MIB:
            at = bisect_left(free, wanted)
            new = _PIECE if wanted < _LARGE else -(-wanted // (2 * _MIB)) * 2 * _MIB
            whole = free.pop(at) if at < len(free) else new
            if whole - wanted > _MIB:
                insort(free, whole - wanted)
            else:
                wanted = whole
        total += wanted
    return total


def rank_memory(
    shapes: Mapping[str, tuple[int, ...]],
    rules: Mapping[str, Rule],
    layout: Layout,
    *,
    rank: int = 0,
    bytes_per_element: int = 4,
    optimizer_states: int = 2,
    data_parallel: DataParallel = "shard",
    in_blocks: bool = False,
) -> RankMemory:
    """Memory of `rank` of `layout` for parameters of these global shapes.

    bytes_per_element: of parameters, gradients and optimizer states (4 for 32-true and the mixed
    precisions, 2 for bf16-true). optimizer_states: tensors per parameter, 2 for AdamW.
    data_parallel: "shard" divides everything over the data ranks too, experts over their replicas.
    in_blocks: bytes as an allocator counts them (`blocks`): parameters first, then gradients from the last to the
        first, then the states of one parameter after the other.
    """
    elements = 0
    sizes: list[int] = []
    for name, shape in shapes.items():
        rule = rules[name]
        ranks = layout.expert if rule.axis == "expert" else layout.tensor
        own = rule.local_shape(shape, rank % ranks, ranks)
        if data_parallel == "shard":
            replicas = layout.world // ranks
            # As `parallelize_over_data` does: experts by their width where there are fewer of them than replicas.
            dim = 1 if rule.axis == "expert" and own[0] < replicas else 0
            start, stop = chunk_bounds(own[dim], rank // ranks, replicas)
            own = (*own[:dim], stop - start, *own[dim + 1 :])
        elements += prod(own)
        sizes.append(prod(own) * bytes_per_element)
    count: Callable[[Iterable[int]], int] = blocks if in_blocks else sum
    held = count(sizes)
    with_gradients = count([*sizes, *reversed(sizes)])
    states = [size for size in sizes for _ in range(optimizer_states)]
    return RankMemory(
        parameters=elements,
        parameter_bytes=held,
        gradient_bytes=with_gradients - held,
        optimizer_bytes=count([*sizes, *reversed(sizes), *states]) - with_gradients,
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the parameters of a model need; see `rank_memory`."""

    shapes: Mapping[str, tuple[int, ...]]
    rules: Mapping[str, Rule]
    bytes_per_element: int = 4
    optimizer_states: int = 2
    data_parallel: DataParallel = "shard"

    def memory(self, layout: Layout, names: str = "", data_parallel: DataParallel | None = None) -> RankMemory:
        """Of rank 0, which never holds less than another; of parameters whose name the pattern matches."""
        return rank_memory(
            {name: shape for name, shape in self.shapes.items() if re.search(names, name)},
            self.rules,
            layout,
            bytes_per_element=self.bytes_per_element,
            optimizer_states=self.optimizer_states,
            data_parallel=data_parallel or self.data_parallel,
            in_blocks=True,
        )


@dataclass(frozen=True)
class StepPeak:
    """The most bytes in tensors at the three parts of a step."""

    forward: int
    backward: int
    optimizer: int

    @property
    def bytes(self) -> int:
        """The most of all."""
        return max(self.forward, self.backward, self.optimizer)


def step_peak(
    model: Model, shape: Shape, *, recompute: Recompute = "none", accumulates: bool = False, first: bool = False
) -> StepPeak:
    """Peak of a training step of rank 0.

    accumulates: whether gradients of an earlier micro-batch are there in the backward pass.
    first:       a run's first step, without gradients and optimizer states before it.
    """
    standing = model.memory(shape.layout)
    base = standing.parameter_bytes + (0 if first else standing.optimizer_bytes) + _always_there(shape)
    # The trainer drops gradients between the forward and the backward pass.
    old = 0 if first else standing.gradient_bytes
    layers = _layers(shape, recompute)
    gathered = _Gathered(model, shape.layout)
    in_loss, in_loss_backward = head(shape)
    embedded, normed = shape.stream, shape.stream + (shape.hidden if shape.is_sliced else 0)

    kept, forward = embedded, 0
    for number, layer in enumerate(layers):
        forward = max(forward, kept + most_forward(layer.whole) + gathered.forward(number))
        kept += sum(row.kept for row in layer.kept)
    kept += normed
    forward = max(forward, kept + in_loss + gathered.around)

    gradients = old if accumulates else gathered.gradients_around
    backward = kept + in_loss_backward + gradients + gathered.around
    for number, layer in reversed(list(enumerate(layers))):
        kept -= sum(row.kept for row in layer.kept)
        backward = max(backward, kept + _backward(layer, shape) + gradients + gathered.backward(number))
        if not accumulates:
            gradients += gathered.gradients(number)
        backward = max(backward, kept + shape.stream + gradients + gathered.backward(number))
    # Of the group with weight decay, nearly all: a square root of the averages while for-each updates.
    update = standing.parameter_bytes + standing.gradient_bytes + standing.optimizer_bytes + _always_there(shape)
    return StepPeak(
        forward=base + old + forward,
        backward=base + backward,
        optimizer=update + standing.parameter_bytes,
    )


@dataclass(frozen=True)
class _Layer:
    """What the forward pass keeps, and everything that is kept once the layer has been computed again."""

    kept: list[Row]
    whole: list[Row]


def _layers(shape: Shape, recompute: Recompute) -> list[_Layer]:
    dense = shape.sizes.layers - shape.sizes.sparse_layers
    layers = []
    for sparse in [False] * dense + [True] * shape.sizes.sparse_layers:
        rows = layer_rows(shape, sparse=sparse, keep_experts=recompute != "moe")
        # The layer's input, which is the result of the layer before.
        layers.append(_Layer(kept=[Row(kept=shape.stream)] if recompute == "block" else rows, whole=rows))
    return layers


def _backward(layer: _Layer, shape: Shape) -> int:
    """The most while the backward pass of the layer runs, with what it kept and the gradient that comes in."""
    most = most_backward(layer.whole)
    if layer.kept is not layer.whole:
        most = max(most, most_forward(layer.whole)) + sum(row.kept for row in layer.kept)
    return most + shape.stream


def _always_there(shape: Shape) -> int:
    return CAUSAL_MASK if "attention" in shape.fused else 0


class _Gathered:
    """Whole parameters and gradients of the layers, beside the slices that data ranks keep."""

    def __init__(self, model: Model, layout: Layout) -> None:
        self._model, self._layout = model, layout
        numbers = {int(m.group(1)) for name in model.shapes if (m := re.search(r"layers\.(\d+)\.", name))}
        self._of = [self._bytes(rf"layers\.{number}\.") for number in sorted(numbers)]
        whole, sliced = self._bytes(r"^(?!.*layers\.\d+\.)")
        self._is_shared = model.data_parallel == "shard" and layout.data > 1
        # The outermost group stays gathered from the forward to the backward pass.
        self.around = whole if self._is_shared else 0
        self.gradients_around = sliced

    def _bytes(self, names: str) -> tuple[int, int]:
        """Of parameters that match: gathered over the data ranks where FSDP does that, and as this rank keeps them."""
        whole = self._model.memory(self._layout, names, "replicate").parameter_bytes
        if self._layout.expert_replicas == 1:
            # Experts that no other rank holds are never gathered.
            whole -= self._model.memory(self._layout, rf"{names}.*\.experts\.", "replicate").parameter_bytes
        return whole, self._model.memory(self._layout, names).parameter_bytes

    def forward(self, number: int) -> int:
        """The layer at work, and the buffer that it came in."""
        return self.around + 2 * self._of[number][0] if self._is_shared else 0

    def backward(self, number: int) -> int:
        """The layer at work, the next one arriving, and gradients on their way to be summed."""
        if not self._is_shared:
            return 0
        own, after = self._of[number][0], self._of[number - 1][0] if number else 0
        return self.around + own + after + 2 * own

    def gradients(self, number: int) -> int:
        """Of this rank's parameters of the layer."""
        return self._of[number][1]
