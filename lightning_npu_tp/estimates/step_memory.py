"""Bytes per rank: pure arithmetic over the plan and the shapes, no device and no weights needed.

`rank_memory` counts what stays for the whole run: parameters, gradients and optimizer states. `step_peak` walks
through one training step as the trainer does it (forward pass with the last step's gradients still there, backward
pass, optimizer) and adds what layers keep (`layer_memory.py`), what data parallelism gathers and what the optimizer
needs while it updates. Not counted: an allocator's rounding of activations, workspaces of kernels, and buffers of
HCCL, which no allocator of torch sees.
"""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

from lightning_npu_tp.convert.data_parallel import DataParallel
from lightning_npu_tp.convert.shard_spec import ShardSpec, size_of
from lightning_npu_tp.estimates.layer_memory import (
    CAUSAL_MASK,
    Beside,
    Row,
    Shape,
    head,
    layer_rows,
    most_at_once,
    most_backward,
    most_forward,
)
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.parallel.plan import Rule
from lightning_npu_tp.parallel.recompute import Recompute


@dataclass(frozen=True)
class RankMemory:
    """What one rank holds for the whole run: `parameters` in elements, the rest in bytes."""

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
    precisions, 2 for bf16-true). optimizer_states: per parameter, in its own size; 2 for AdamW.
    data_parallel: "shard" divides everything over the data ranks too, experts over their replicas.
    in_blocks: bytes as an allocator counts them (`blocks`): parameters first, then gradients from the last to the
        first, then the states of one parameter after the other.
    """
    specs = (ShardSpec.of(rules[name], shape, layout, rank, data_parallel) for name, shape in shapes.items())
    elements = [prod(size_of(spec.held)) for spec in specs]
    sizes = [number * bytes_per_element for number in elements]
    count: Callable[[Iterable[int]], int] = blocks if in_blocks else sum
    held = count(sizes)
    with_gradients = count([*sizes, *reversed(sizes)])
    states = [size for size in sizes for _ in range(optimizer_states)]
    return RankMemory(
        parameters=sum(elements),
        parameter_bytes=held,
        gradient_bytes=with_gradients - held,
        optimizer_bytes=count([*sizes, *reversed(sizes), *states]) - with_gradients,
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model's parameters and what is kept of each, for the arithmetic of any layout; fields as in `rank_memory`."""

    shapes: Mapping[str, tuple[int, ...]]
    rules: Mapping[str, Rule]
    bytes_per_element: int = 4
    optimizer_states: int = 2
    data_parallel: DataParallel = "shard"

    def memory(
        self, layout: Layout, names: Iterable[str] | None = None, data_parallel: DataParallel | None = None
    ) -> RankMemory:
        """What rank 0, which never holds less than another, holds of the parameters named, or of all."""
        return rank_memory(
            self.shapes if names is None else {name: self.shapes[name] for name in names},
            self.rules,
            layout,
            bytes_per_element=self.bytes_per_element,
            optimizer_states=self.optimizer_states,
            data_parallel=data_parallel or self.data_parallel,
            in_blocks=True,
        )


@dataclass(frozen=True)
class StepPeak:
    """The most bytes in tensors in each of the three parts of a training step."""

    forward: int
    backward: int
    optimizer: int

    @property
    def bytes(self) -> int:
        """The most bytes in tensors at any time of the step."""
        return max(self.forward, self.backward, self.optimizer)


def step_peak(model: Model, shape: Shape, *, recompute: Recompute = "none", accumulates: bool = False) -> StepPeak:
    """Peak of a training step of rank 0, not the run's first.

    accumulates: whether a step sums the gradients of several micro-batches; the peak is that of the last of them.
    """
    standing, parameters = model.memory(shape.layout), _Parameters(model, shape.layout)
    base = standing.parameter_bytes + standing.optimizer_bytes + _always_there(shape)
    # The trainer drops gradients between the forward and the backward pass. Those of earlier micro-batches stay, and
    # stay whole, since data ranks exchange them once.
    old = parameters.all_gradients if accumulates else standing.gradient_bytes
    layers = _layers(shape, recompute)
    in_loss, in_loss_backward = head(shape)
    embedded, normed = shape.stream, shape.stream + (shape.hidden if shape.is_sliced else 0)

    kept, forward = embedded, parameters.first_arrivals
    for number, layer in enumerate(layers):
        beside = parameters.forward(number)
        forward = max(forward, kept + parameters.arrival(number))
        # What runs again keeps nothing but what is added to.
        needed = (
            2 * shape.stream + most_at_once(layer.whole, beside)
            if layer.is_again
            else most_forward(layer.whole, beside)
        )
        forward = max(forward, kept + needed)
        kept += sum(row.kept for row in layer.kept)
    kept += normed
    forward = max(forward, kept + in_loss + parameters.in_loss)

    gradients = old if accumulates else parameters.outer
    backward = kept + in_loss_backward + gradients + parameters.in_loss_backward
    for number, layer in reversed(list(enumerate(layers))):
        kept -= sum(row.kept for row in layer.kept)
        backward = max(backward, kept + gradients + _backward(layer, shape, parameters, number))
        gradients += parameters.gradients(number) - (parameters.whole(number) if accumulates else 0)
    backward = max(backward, gradients + parameters.at_the_end)
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

    @property
    def is_again(self) -> bool:
        """Whether the backward pass computes the layer again as a whole."""
        return self.kept is not self.whole


def _layers(shape: Shape, recompute: Recompute) -> list[_Layer]:
    dense = shape.sizes.layers - shape.sizes.sparse_layers
    layers = []
    for sparse in [False] * dense + [True] * shape.sizes.sparse_layers:
        rows = layer_rows(shape, sparse=sparse, keep_experts=recompute != "moe")
        # The layer's input, which is the result of the layer before.
        layers.append(_Layer(kept=[Row(kept=shape.stream)] if recompute == "block" else rows, whole=rows))
    return layers


def _backward(layer: _Layer, shape: Shape, parameters: _Parameters, number: int) -> int:
    """The most while the backward pass of the layer runs, with what it kept and the gradient that comes in."""
    most = most_backward(layer.whole, parameters.backward(number)) + shape.stream
    # Beside all that came back, the input that it came from.
    return most + sum(row.kept for row in layer.kept) if layer.is_again else most


def _always_there(shape: Shape) -> int:
    return CAUSAL_MASK if "attention" in shape.fused else 0


class _Parameters:
    """Bytes of parameters and gradients that come and go in a step: what FSDP gathers, and what it reduces.

    Of each layer that is its dense parameters and, where several ranks hold the same experts, these: two groups that
    FSDP handles one after the other. Around the layers are those of the decoder (embedding, last norm) and the
    outermost (head). A group arrives in a buffer and is copied out of it; the buffer stays until the next group of the
    forward pass has arrived. In the backward pass the next group arrives ahead, and what a group's gradients were
    copied to stays until another group is reduced. Replicas need no buffer, but are copied all the same, and their
    copies stay from the forward pass until their backward pass has run.
    """

    def __init__(self, model: Model, layout: Layout) -> None:
        self._is_shared = layout.data > 1
        self._has_buffers = self._is_shared and model.data_parallel == "shard"
        # Experts that no other rank holds are never gathered.
        self._has_experts = self._is_shared and layout.expert_replicas > 1
        decoder = next((name[: name.index("layers.")] for name in model.shapes if "layers." in name), "")
        outer: list[str] = []
        inner: list[str] = []
        dense: dict[int, list[str]] = defaultdict(list)
        experts: dict[int, list[str]] = defaultdict(list)
        for name in model.shapes:
            if found := re.search(r"layers\.(\d+)\.", name):
                (experts if ".experts." in name else dense)[int(found.group(1))].append(name)
            else:
                (inner if name.startswith(decoder) else outer).append(name)

        def whole(names: list[str]) -> int:
            return model.memory(layout, names, "replicate").parameter_bytes

        layers = sorted(dense)
        self._dense, self._experts = ([whole(of[number]) for number in layers] for of in (dense, experts))
        self._own = [model.memory(layout, dense[number] + experts[number]).parameter_bytes for number in layers]
        self.outer, self._decoder = whole(outer), whole(inner)
        if not self.outer:
            # A head that is the embedding.
            self.outer, self._decoder = self._decoder, 0
        self._tied = 0 if self._decoder else self.outer

    @property
    def all_gradients(self) -> int:
        """Bytes of the whole gradients of all parameters."""
        return self.outer + self._decoder + sum(self._dense) + sum(self._experts)

    def whole(self, number: int) -> int:
        """Bytes of a layer's gradients before they are reduced."""
        return self._dense[number] + self._experts[number]

    def gradients(self, number: int) -> int:
        """Bytes of a layer's gradients that stay with this rank."""
        return self._own[number]

    @property
    def in_loss(self) -> int:
        """Bytes beside the loss in the forward pass; the decoder's slices are slices again."""
        if not self._has_buffers:
            return self.in_loss_backward
        return self.outer + self._buffer(self._last_group(len(self._dense) - 1))

    @property
    def in_loss_backward(self) -> int:
        """Bytes beside the loss in the backward pass, when the decoder's group has arrived."""
        return self.outer + self._decoder + self._copies(len(self._dense)) if self._is_shared else 0

    @property
    def at_the_end(self) -> int:
        """Bytes beside other gradients when the backward pass has ended, and what lies around the layers is reduced.

        The embedding's gradients, and their sum with those of a head that is the same parameter.
        """
        return 2 * self._tied + self._decoder + (self.outer + self._decoder if self._is_shared else 0)

    @property
    def first_arrivals(self) -> int:
        """Bytes before the first layer: the groups around the layers, and their buffers."""
        around = self.outer + self._decoder
        return around + self._buffer(self.outer) + self._buffer(self._decoder) if self._is_shared else 0

    def arrival(self, number: int) -> int:
        """Bytes before a layer's forward pass, when its group has just been copied."""
        if not self._is_shared:
            return 0
        last = self._last_group(number - 1) if number else self._decoder or self.outer
        return self._around(number) + self._dense[number] + self._buffer(self._dense[number]) + self._buffer(last)

    def forward(self, number: int) -> Beside:
        """Bytes beside a layer in its forward pass."""
        if not self._is_shared:
            return Beside()
        beside, dense, experts = self._around(number), self._dense[number], self._gathered_experts(number)
        arrived = beside + dense + self._buffer(dense)
        if not experts:
            return Beside(arrived, arrived, arrived)
        both = beside + dense + experts
        return Beside(
            attention=arrived,
            before_experts=both + self._buffer(dense) + self._buffer(experts),
            experts=both + self._buffer(experts),
            mlp=both,
        )

    def backward(self, number: int) -> Beside:
        """Bytes beside a layer in its backward pass, its own gradients included."""
        dense, experts = self._dense[number], self._gathered_experts(number)
        if not self._is_shared:
            return Beside(self._own[number], self._experts[number] + dense // 2, dense // 2)
        beside, arriving = self._around(number) + dense, self._buffer(self._dense[number - 1]) if number else 0
        # Of the dense gradients about half, until attention's come.
        until = beside + dense // 2 + self._reduced(number + 1)
        if not experts:
            alone = self._experts[number]
            whole = beside + arriving + alone + dense + self._reduced(number + 1)
            return Beside(whole, until + arriving + alone, until + arriving)
        return Beside(
            attention=beside + arriving + dense + experts, experts=until + arriving + 2 * experts, mlp=until + experts
        )

    def _around(self, number: int) -> int:
        """Parameters around the layers, and copies of the layers below `number`."""
        return self.outer + self._decoder + self._copies(number)

    def _copies(self, number: int) -> int:
        if self._has_buffers:
            return 0
        return sum(self._dense[layer] + self._gathered_experts(layer) for layer in range(number))

    def _reduced(self, number: int) -> int:
        """What the gradients of a layer's dense parameters were copied to."""
        return self._dense[number] if number < len(self._dense) else 0

    def _buffer(self, group: int) -> int:
        return blocks([group]) if self._has_buffers and group else 0

    def _last_group(self, number: int) -> int:
        """Bytes of the layer's parameter group that FSDP gathers last."""
        return self._gathered_experts(number) or self._dense[number]

    def _gathered_experts(self, number: int) -> int:
        return self._experts[number] if self._has_experts else 0
