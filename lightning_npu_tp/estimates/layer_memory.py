"""Bytes that one rank's layers keep and need in a training step: each operation of a layer as a row of a table.

A row says what its forward pass keeps until its backward pass has run, what either of them needs beside that while
it runs, and what gradients of parameters it makes; all from shapes. `step_memory.py` walks through a step with them.
They follow what the layers do (`layers/`, `moe/`, `kernels/`), so a change there changes a row here;
`benchmarks/memory_arithmetic.py` holds them against an allocator.

Sizes are of this rank: T tokens of its micro-batch, s of them outside of regions (a slice of each sequence, or all),
R rows of routed experts, D hidden. `unit` is the bytes of an activation, 4 what is computed in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from lightning_npu_tp.estimates.model_sizes import ModelSizes
from lightning_npu_tp.parallel.layout import Layout

Part = Literal["attention", "experts", "mlp"]

_FLOAT32 = 4
# Of a token in attention's statistics: maximum and sum, eight numbers each, per head.
_STATISTICS = 2 * 8 * _FLOAT32
# npu_fusion_attention's compressed causal mask.
CAUSAL_MASK = 2048 * 2048
# Logits of a chunk in float32; layers/vocab.py.
_LOGITS = 64 * 2**20


@dataclass(frozen=True)
class Row:
    """What one operation of a layer needs, in bytes on one rank.

    kept:      from its forward pass until its backward pass has run.
    forward:   needed beside while the forward pass runs.
    backward:  needed beside while the backward pass runs, the gradient of its result included.
    part:      of the layer: "attention" and what else comes before the rest, routed "experts", "mlp" for what is left.
    """

    kept: int = 0
    forward: int = 0
    backward: int = 0
    part: Part = "attention"


@dataclass(frozen=True)
class Beside:
    """Bytes beside a layer's own while a part of it runs (see `Row.part`), and before its routed experts begin."""

    attention: int = 0
    experts: int = 0
    mlp: int = 0
    before_experts: int = 0

    def row(self, row: Row) -> int:
        """Bytes beside the layer's own while `row` runs."""
        return int(getattr(self, row.part))


_ALONE = Beside()


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides the sizes of one rank's tensors.

    fused: operations of `strategy.kernels` that torch_npu's fused kernels compute; the others are plain PyTorch.
    """

    sizes: ModelSizes
    layout: Layout
    batch: int
    length: int
    unit: int = 4
    sequence_parallel: bool = False
    all_to_all: bool = False
    fused: frozenset[str] = field(default_factory=frozenset)

    @property
    def tokens(self) -> int:
        """Tokens of a data rank's micro-batch, which its tensor ranks share."""
        return self.batch * self.length

    @property
    def outside(self) -> int:
        """Tokens of this rank outside of split regions: its slice of the sequences, or all."""
        if not self.is_sliced:
            return self.tokens
        return self.batch * -(-self.length // self.layout.tensor)

    @property
    def is_sliced(self) -> bool:
        """Whether sequences lie in slices between regions."""
        return self.sequence_parallel and self.layout.tensor > 1

    @property
    def hidden(self) -> int:
        """Bytes of the hidden state of all tokens."""
        return self.tokens * self.sizes.hidden * self.unit

    @property
    def stream(self) -> int:
        """Bytes of the hidden state between regions."""
        return self.outside * self.sizes.hidden * self.unit


def layer_rows(shape: Shape, *, sparse: bool, keep_experts: bool = True) -> list[Row]:
    """Rows of one decoder layer, in the order of its forward pass.

    keep_experts: whether what routed experts compute is kept for the backward pass.
    """
    attention = latent_attention if shape.sizes.kv_latent else grouped_attention
    mlp = mixture(shape, keep_experts=keep_experts) if sparse else dense_mlp(shape)
    add = Row(kept=shape.stream)
    return [*norm(shape), *attention(shape), add, *norm(shape), *mlp, add]


def most_forward(rows: list[Row], beside: Beside = _ALONE) -> int:
    """Bytes that rows need at most, one after the other in a forward pass, what they keep included."""
    most = kept = 0
    for row in rows:
        if row.part == "experts":
            most = max(most, kept + beside.before_experts)
        kept += row.kept
        most = max(most, kept + row.forward + beside.row(row))
    return most


def most_at_once(rows: list[Row], beside: Beside = _ALONE) -> int:
    """Bytes that any one of the rows needs in a forward pass that keeps nothing."""
    return max(row.kept + row.forward + beside.row(row) for row in rows)


def most_backward(rows: list[Row], beside: Beside = _ALONE) -> int:
    """Bytes that rows need at most in their backward pass, from what all of them kept to nothing."""
    most, kept = 0, sum(row.kept for row in rows)
    for row in reversed(rows):
        most = max(most, kept + row.backward + beside.row(row))
        kept -= row.kept
    return most


def norm(shape: Shape) -> list[Row]:
    """Rows of a norm of hidden states and of the entrance of the region behind it."""
    # Slices are gathered: what the ranks' parts of the work keep is whole.
    entered = shape.hidden if shape.is_sliced else shape.stream
    kept = entered + shape.outside * _FLOAT32
    if "rms_norm" not in shape.fused:
        # In float32: its input, where that is a copy, and its result before the weight.
        kept += shape.outside * shape.sizes.hidden * (_copy(shape) + shape.unit)
    return [Row(kept=kept, forward=shape.stream, backward=entered + 2 * shape.stream)]


def latent_attention(shape: Shape) -> list[Row]:
    """Rows of multi-head latent attention on this rank's heads."""
    sizes, tokens, unit = shape.sizes, shape.tokens, shape.unit
    heads = sizes.heads // shape.layout.tensor
    alike = tokens if shape.is_sliced else shape.outside
    key, value, rope = heads * sizes.key_dim, heads * sizes.value_dim, sizes.rope_dim
    queries, keys = tokens * key * unit, tokens * key * unit
    rows = []
    if sizes.q_latent:
        rows.append(_latent(shape, alike * sizes.q_latent))
    # The rotation keeps what it rotates: in float32 a part of the queries, and with it all of them.
    rotated_q = queries if unit == _FLOAT32 else tokens * heads * rope * _FLOAT32
    rows.append(Row(kept=rotated_q + _tables(shape, rope), forward=2 * queries, backward=2 * queries))
    rotated_k = 0 if unit == _FLOAT32 else tokens * rope * _FLOAT32
    down = alike * (sizes.kv_latent + rope) * unit
    rows.append(Row(kept=rotated_k + down + _tables(shape, rope), forward=down, backward=2 * down))
    rows.append(_latent(shape, alike * sizes.kv_latent, is_part=True))
    up = tokens * heads * (sizes.key_dim - rope + sizes.value_dim) * unit
    rows.append(Row(forward=up, backward=2 * up + queries))
    rows.append(_attention(shape, queries, keys, tokens * value * unit))
    rows.append(Row(forward=2 * shape.hidden, backward=tokens * value * unit + shape.hidden))
    return rows


def grouped_attention(shape: Shape) -> list[Row]:
    """Rows of grouped-query attention on this rank's heads."""
    sizes, tokens, unit = shape.sizes, shape.tokens, shape.unit
    ranks = shape.layout.tensor
    queries = tokens * (sizes.heads // ranks) * sizes.key_dim * unit
    keys = tokens * max(1, sizes.key_heads // ranks) * sizes.key_dim * unit
    values = tokens * max(1, sizes.key_heads // ranks) * sizes.value_dim * unit
    rows = []
    for projected in (queries, keys):
        if sizes.head_norms:
            rows.append(Row(kept=projected, forward=projected, backward=2 * projected))
        rotated = projected * _FLOAT32 // unit
        rows.append(Row(kept=rotated + _tables(shape, sizes.key_dim), forward=rotated, backward=2 * rotated))
    out = tokens * (sizes.heads // ranks) * sizes.value_dim * unit
    rows.append(_attention(shape, queries, keys, values, out=out))
    rows.append(Row(forward=2 * shape.hidden, backward=out + shape.hidden))
    return rows


def dense_mlp(shape: Shape) -> list[Row]:
    """The row of a dense MLP: gate, up, activation and product."""
    return [_gated(shape, shape.sizes.dense_width)]


def mixture(shape: Shape, *, keep_experts: bool = True) -> list[Row]:
    """Rows of a mixture: router, routed experts and shared experts; see `layer_rows`."""
    sizes, unit = shape.sizes, shape.unit
    scores = shape.outside * sizes.experts * _FLOAT32
    # Its input in float32, where that is a copy; and of slices the slice itself, beside what was gathered.
    routed = shape.outside * sizes.hidden * _copy(shape) + (shape.stream if shape.is_sliced else 0)
    picks = shape.outside * sizes.picks * 24
    rows = [Row(kept=scores + routed + picks, forward=3 * scores, backward=2 * scores + 2 * shape.stream)]
    travelling, experts, back = _experts(shape)
    if not keep_experts:
        # Their input only: what arrived, or what entered the region, which has been counted.
        arrived, again = (travelling[0].forward // 2 if travelling else 0), most_forward(experts)
        experts = [Row(kept=arrived, forward=again, backward=max(again, most_backward(experts)), part="experts")]
    shared = [_gated(shape, sizes.shared_width)] if sizes.shared_width else []
    # Shared experts run while rows travel.
    rows += [*travelling, *shared, *experts, *back] if shape.all_to_all else [*experts, *shared]
    wide = shape.tokens * sizes.hidden * _FLOAT32
    rounded = wide if unit < _FLOAT32 else 0
    rows.append(Row(forward=wide + 2 * shape.hidden, backward=rounded + shape.hidden, part="mlp"))
    return rows


def head(shape: Shape) -> tuple[int, int]:
    """Bytes that the loss needs while it is computed, in the forward and in the backward pass."""
    sizes, unit = shape.sizes, shape.unit
    columns = -(-sizes.vocabulary // shape.layout.tensor)
    chunk = min(shape.tokens, max(1, _LOGITS // (columns * _FLOAT32)))
    logits = chunk * columns * _FLOAT32
    narrow = chunk * columns * unit if unit < _FLOAT32 else 0
    product = columns * sizes.hidden * unit
    accumulated = columns * sizes.hidden * _FLOAT32 if chunk < shape.tokens else 0
    return logits + narrow, max(logits + narrow, logits + narrow + product) + accumulated + shape.hidden


def _gated(shape: Shape, width: int) -> Row:
    """Gate and up projections, activation and product, kept each; and the two gradients that meet at their input."""
    one = shape.tokens * (width // shape.layout.tensor) * shape.unit
    backward = max(3 * one, 2 * one + 2 * shape.hidden) + shape.hidden
    return Row(kept=4 * one, forward=shape.hidden, backward=backward, part="mlp")


def _experts(shape: Shape) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows of routed experts: as many as could come with tokens that all ranks see.

    Where they travel, as many as an even router sends. Returns the way there, what experts compute, and the way back.
    """
    sizes, unit = shape.sizes, shape.unit
    local = sizes.experts // shape.layout.expert
    if shape.all_to_all:
        share = -(-shape.tokens // shape.layout.tensor)
        num_rows = share * sizes.picks
    else:
        num_rows = shape.tokens * min(sizes.picks, local)
    rows, width = num_rows * sizes.hidden * unit, num_rows * sizes.expert_width * unit
    shared = shape.hidden if sizes.shared_width else 0
    travelling = [Row(kept=0, forward=2 * rows, backward=2 * rows + shared)] if shape.all_to_all else []
    back = [Row(kept=rows, forward=rows, backward=2 * rows + shared, part="mlp")] if shape.all_to_all else []
    # The rows that came in last until their experts have run.
    came = rows if shape.all_to_all else 0
    experts = [
        Row(kept=rows, forward=rows + came, backward=2 * rows + shared),
        Row(kept=2 * width, forward=came, backward=rows + 2 * width + shared),
        Row(kept=width, forward=came, backward=3 * width + shared),
        Row(kept=rows, forward=rows + came, backward=2 * rows + shared),
    ]
    return travelling, [replace(row, part="experts") for row in experts], back


def _attention(shape: Shape, queries: int, keys: int, values: int, *, out: int | None = None) -> Row:
    out = values if out is None else out
    statistics = shape.tokens * (shape.sizes.heads // shape.layout.tensor) * _STATISTICS
    return Row(kept=queries + keys + values + out + statistics, forward=out, backward=queries + keys + values + out)


def _latent(shape: Shape, elements: int, *, is_part: bool = False) -> Row:
    """The norm of a latent; one that is a part of what was projected has been counted with that."""
    kept = elements * shape.unit * (1 if is_part else 2)
    if "rms_norm" not in shape.fused:
        kept += elements * (_copy(shape) + shape.unit)
    return Row(kept=kept, backward=2 * elements * shape.unit)


def _tables(shape: Shape, width: int) -> int:
    """Cosines and sines of every token at full width, which the fused rotation takes and keeps."""
    return 2 * shape.tokens * width * _FLOAT32 if "rotary" in shape.fused else 0


def _copy(shape: Shape) -> int:
    """Bytes of an element that is copied to float32; none where it is float32 already."""
    return _FLOAT32 if shape.unit < _FLOAT32 else 0


FUSED = frozenset({"grouped_matmul", "permute", "swiglu", "rms_norm", "rotary", "attention"})


def fused_by(names: Mapping[str, str]) -> frozenset[str]:
    """Operations that torch_npu computes, of the names of the chosen kernels (`Kernels.names`)."""
    return frozenset(operation for operation, name in names.items() if name == "npu") & FUSED
