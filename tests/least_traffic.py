"""The least that a layout must move: bytes that one rank sends per training step, by axis.

Pure arithmetic over a model's sizes and its sharding plan, for one micro-batch without recompute: what an ideal
implementation of the layout moves, not what ours does. For latent attention without a query latent, and mixtures with
shared experts. Per rank and over n ranks an all-reduce of x bytes sends f x with f = 2 (n - 1) / n, a gather or a
scatter half of that; a region over slices of the sequence gathers and scatters what an all-reduce does in one.

X = tokens * hidden size, w = width of the latents that all heads share; d, p: data ranks, expert replicas.

    embedding, head        f X each; the loss f * 2 numbers per token
    attention              forward f X, backward f X: input and output
      its latents          backward f * the smaller of tokens * w (sum their gradients) and their projections'
                           parameters / d (sum the parameters' gradients, after the data ranks have scattered them)
    MLP or mixture         forward f X, backward f X, for routed and shared experts together
      its router           backward f * the smaller of tokens * picks and its parameters / d
      all-to-all           2 rows that leave forward, 2 backward; counts
    replicated parameters  slices: f * their number / d
    data ranks             a layer's parameters are gathered twice and scattered once, the rest gathered once and
                           scattered once: (d - 1) / d of them each time; experts' the same over p

Source: ring and recursive-halving bounds as in Thakur et al., 2005; the layouts are ours.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from lightning_npu_tp.convert.shard_spec import ShardSpec, size_of
from lightning_npu_tp.estimates.model_sizes import ModelSizes
from lightning_npu_tp.parallel.layout import (
    DATA_AXIS,
    EXPERT_AXIS,
    EXPERT_REPLICA_AXIS,
    TENSOR_AXIS,
    Layout,
    resolve_dispatch,
)
from lightning_npu_tp.parallel.plan import Rule

_LATENT_PROJECTIONS = ("kv_a_proj_with_mqa", "kv_a_layernorm")


def least_traffic(
    config: Any,
    shapes: Mapping[str, tuple[int, ...]],
    rules: Mapping[str, Rule],
    layout: Layout,
    *,
    tokens: int,
    rows_away: float,
    element_bytes: int,
    sliced: bool,
) -> dict[str, float]:
    """The least bytes that a rank sends per training step, by axis.

    shapes, rules: global shape and rule of each parameter, by name.
    tokens:        of one data rank, padding included.
    rows_away:     rows per layer with experts that leave their rank in an all-to-all, mean over ranks and layers.
    element_bytes: of parameters, gradients and activations.
    sliced:        whether activations outside of regions are slices.
    """
    sizes, sent = ModelSizes.of(config), defaultdict[str, float](float)
    crossing, wide = tokens * sizes.hidden, max(element_bytes, 4)
    exchanges = resolve_dispatch(layout, "auto") == "all_to_all"

    def all_reduce(num_bytes: float) -> None:
        sent[TENSOR_AXIS] += 2 * (layout.tensor - 1) / layout.tensor * num_bytes

    def held(names: Iterable[str]) -> int:
        """Bytes on one rank, before data ranks share them."""
        specs = (ShardSpec.of(rules[name], shapes[name], layout, 0) for name in names)
        return element_bytes * sum(prod(size_of(spec.bounds)) for spec in specs)

    # "" is what lies around the layers.
    layers: dict[str, list[str]] = {"": []}
    for name in shapes:
        layer = re.match(r".*\.layers\.\d+\.", name)
        layers.setdefault(layer[0] if layer else "", []).append(name)
    for layer, names in layers.items():
        experts = [name for name in names if rules[name].axis == "expert"]
        dense = [name for name in names if name not in experts]
        latents = [name for name in dense if name.split(".")[-2] in _LATENT_PROJECTIONS]
        if layer:
            gradients = tokens * (sizes.kv_latent + sizes.rope_dim) * element_bytes
            all_reduce(4 * crossing * element_bytes + min(gradients, held(latents) / layout.data))
        else:
            all_reduce(2 * crossing * element_bytes + 2 * tokens * wide)
        if sliced:
            alike = [name for name in dense if rules[name].dim is None and name not in latents]
            all_reduce(held(alike) / layout.data)
        elif experts:
            router = held(name for name in dense if name.endswith(".gate.weight"))
            all_reduce(min(tokens * sizes.picks * wide, router / layout.data))
        if experts and exchanges:
            counts = sizes.experts * 8 * (layout.expert - 1) / layout.expert
            sent[EXPERT_AXIS] += 4 * rows_away * sizes.hidden * element_bytes + counts
        trips = 3 if layer else 2
        sent[DATA_AXIS] += trips * held(dense) * (layout.data - 1) / layout.data
        replicas = layout.expert_replicas
        sent[EXPERT_REPLICA_AXIS] += trips * held(experts) * (replicas - 1) / replicas
    return {axis: number for axis, number in sent.items() if number}
