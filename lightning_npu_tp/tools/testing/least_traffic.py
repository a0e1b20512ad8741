"""The least that a layout must move: bytes that one rank sends per training step, by part of the model.

Pure arithmetic over a config's sizes and the sharding plan, for one micro-batch without recompute. It says what
an ideal implementation of the layout moves, not what ours does; `testing/traffic.py` counts that. Per rank and
over n ranks an all-reduce of x bytes sends f x with f = 2 (n - 1) / n, a gather or a scatter half of that.

X = tokens * hidden size, w = width of the latents that all heads share; t, d, p, r: tensor, data, expert ranks,
expert replicas. A sequence-parallel region gathers and scatters what an all-reduce does in one.

    embedding              forward f X (slices: half of it forward, half backward)
    head                   backward f X (slices: half, half); loss: f * 2 numbers per token
    attention              forward f X, backward f X: input and output
      its latents          backward f * the smaller of tokens * w (sum their gradients) and their projections'
                           parameters / d (sum the parameters' gradients, after the data ranks have scattered them)
      with a query latent  only the latents cross the region's entry where that is less
    dense MLP              forward f X, backward f X
    mixture of experts     forward f X, backward f X, for routed and shared experts together; routing: backward
                           f * the smaller of tokens * picks and the router's parameters / d
      all-to-all           2 rows that leave forward, 2 backward; counts. The region is then the shared experts'
    replicated parameters  slices: f * their number / d
    data ranks             sharded: a layer's parameters are gathered twice and scattered once, the rest gathered
                           once and scattered once; replicated: one all-reduce. (d - 1) / d of them each time
    experts' parameters    the same over their replicas

Source: ring and recursive-halving bounds as in Thakur et al., 2005; the layouts are ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from lightning_npu_tp.parallel.layout import (
    DATA_AXIS,
    EXPERT_AXIS,
    EXPERT_REPLICA_AXIS,
    TENSOR_AXIS,
    Dispatch,
    Layout,
    resolve_dispatch,
)
from lightning_npu_tp.parallel.plan import Rule

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_LATENT_PROJECTIONS = ("kv_a_proj_with_mqa", "kv_a_layernorm", "q_a_proj", "q_a_layernorm")
_ROW_TRIPS = 4
_COUNT_BYTES = 8


@dataclass(frozen=True)
class Share:
    """What one part of the model moves at least over one axis, in bytes that a rank sends per step."""

    part: str
    axis: str
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """One training step as traffic sees it.

    config:    of the model (hidden_size, and kv_lora_rank, num_experts_per_tok, … where it has them).
    shapes, rules: global shape and rule of each parameter, by name.
    tokens:    of one data rank, padding included.
    rows_away: rows per layer with experts that leave their rank in an all-to-all, mean over the ranks and layers.
    element_bytes: of parameters, gradients and activations.
    """

    config: Any
    shapes: Mapping[str, tuple[int, ...]]
    rules: Mapping[str, Rule]
    layout: Layout
    tokens: int
    rows_away: float = 0.0
    element_bytes: int = 4
    sequence_parallel: bool = False
    dispatch: Dispatch = "auto"
    data_parallel: str = "shard"

    @property
    def sliced(self) -> bool:
        """Whether activations outside of regions are slices."""
        return self.sequence_parallel and self.layout.tensor > 1

    def parameters(self, *, layer: int | None, expert: bool = False, only: tuple[str, ...] = ()) -> int:
        """Elements on one rank, before the data ranks share them; `layer` None is what lies outside of layers.

        only: those whose owner has one of these names.
        """
        number = 0
        for name, shape in self.shapes.items():
            rule, found = self.rules[name], _LAYER.search(name)
            if (int(found[1]) if found else None) != layer or (rule.axis == "expert") != expert:
                continue
            if not only or name.split(".")[-2] in only:
                ranks = self.layout.expert if expert else self.layout.tensor
                number += prod(rule.local_shape(shape, 0, ranks))
        return number

    def replicated(self, *, layer: int | None, leave_out: tuple[str, ...] = ()) -> int:
        """Elements of replicated parameters, but for those of these owners."""
        return sum(
            prod(shape)
            for name, shape in self.shapes.items()
            if self.rules[name].dim is None
            and (int(found[1]) if (found := _LAYER.search(name)) else None) == layer
            and name.split(".")[-2] not in leave_out
        )


def minimum_traffic(work: Work) -> list[Share]:
    """The least bytes that a rank sends per step, by part of the model and axis; parts without any are left out."""
    layers = sorted({int(found[1]) for name in work.shapes if (found := _LAYER.search(name))})
    shares = [*_embedding_and_head(work)]
    for layer in layers:
        shares += [*_attention(work, layer), *_feed_forward(work, layer), *_data(work, layer, f"layer {layer}")]
        shares.append(_replicated(work, layer, f"layer {layer}"))
    shares += [*_data(work, None, "outside of layers"), _replicated(work, None, "outside of layers")]
    return [share for share in shares if share.bytes > 0]


def total_by_axis(shares: list[Share]) -> dict[str, float]:
    """Bytes by axis."""
    found: dict[str, float] = {}
    for share in shares:
        found[share.axis] = found.get(share.axis, 0.0) + share.bytes
    return found


def _all_reduce(elements: float, ranks: int, element_bytes: int) -> float:
    return 2 * (ranks - 1) / ranks * elements * element_bytes


def _region(work: Work, part: str, elements: float) -> Share:
    return Share(part, TENSOR_AXIS, _all_reduce(elements, work.layout.tensor, work.element_bytes))


def _embedding_and_head(work: Work) -> list[Share]:
    crossing = work.tokens * work.config.hidden_size
    wide = max(work.element_bytes, 4)
    loss = _all_reduce(2 * work.tokens, work.layout.tensor, wide)
    return [_region(work, "embedding", crossing), _region(work, "head", crossing), Share("loss", TENSOR_AXIS, loss)]


def _attention(work: Work, layer: int) -> list[Share]:
    config, part = work.config, f"layer {layer} attention"
    crossing = work.tokens * config.hidden_size
    if not getattr(config, "kv_lora_rank", None):
        return [_region(work, part, 2 * crossing)]
    width = config.kv_lora_rank + config.qk_rope_head_dim + (config.q_lora_rank or 0)
    parameters = work.parameters(layer=layer, only=_LATENT_PROJECTIONS) / work.layout.data
    latents = work.tokens * width
    whole_input = 2 * crossing + min(latents, parameters)
    if not config.q_lora_rank:
        return [_region(work, part, whole_input)]
    # Slices: gathered latents forward, scattered backward, in the place of X, and the parameters' gradients.
    latent_input = crossing + latents + (parameters if work.sliced else 0)
    return [_region(work, part, min(whole_input, latent_input))]


def _feed_forward(work: Work, layer: int) -> list[Share]:
    config, layout, ranks = work.config, work.layout, work.layout.tensor
    crossing = work.tokens * config.hidden_size
    if not work.parameters(layer=layer, expert=True):
        return [_region(work, f"layer {layer} MLP", 2 * crossing)]
    part = f"layer {layer} experts"
    exchanges = resolve_dispatch(layout, work.dispatch) == "all_to_all"
    has_shared = any("shared_expert" in name for name in work.shapes)
    if not exchanges or has_shared:
        region = 2.0 * crossing
    else:
        # Each rank has the whole result for its share of the tokens: gathered, not summed.
        region = 0.0 if work.sliced else crossing
    shares = [_region(work, part, region)]
    if not work.sliced:
        router = work.replicated(layer=layer) - work.replicated(layer=layer, leave_out=("gate",))
        wide = max(work.element_bytes, 4)
        routing = min(work.tokens * config.num_experts_per_tok * wide, router / layout.data * work.element_bytes)
        shares.append(Share(f"layer {layer} routing", TENSOR_AXIS, _all_reduce(routing, ranks, 1)))
    if exchanges and layout.expert > 1:
        rows = _ROW_TRIPS * work.rows_away * config.hidden_size * work.element_bytes
        num_experts = max(shape[0] for name, shape in work.shapes.items() if work.rules[name].axis == "expert")
        counts = num_experts * _COUNT_BYTES * (layout.expert - 1) / layout.expert
        shares += [Share(part, EXPERT_AXIS, rows), Share(f"layer {layer} counts", EXPERT_AXIS, counts)]
    return shares


def _replicated(work: Work, layer: int | None, part: str) -> Share:
    """Gradients of replicated parameters that saw a slice; those of the latents are the attention's."""
    elements = work.replicated(layer=layer, leave_out=_LATENT_PROJECTIONS) if work.sliced else 0
    return _region(work, f"{part} replicated parameters", elements / work.layout.data)


def _data(work: Work, layer: int | None, part: str) -> list[Share]:
    trips = 2 if work.data_parallel == "replicate" or layer is None else 3
    shares = []
    for axis, ranks, expert in (
        (DATA_AXIS, work.layout.data, False),
        (EXPERT_REPLICA_AXIS, work.layout.expert_replicas, True),
    ):
        elements = work.parameters(layer=layer, expert=expert)
        moved = trips * elements * work.element_bytes * (ranks - 1) / ranks
        shares.append(Share(f"{part} parameters", axis, moved))
    return shares
