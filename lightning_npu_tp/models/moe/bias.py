"""Balance without a loss: after each optimizer step, move the bias by which the router chooses.

An expert that got less than its even share of the step's training tokens is favoured a little in the
next step, one that got more is put off a little; weights and gradients never see the bias. Works on any
module of this shape, known by its attributes: `gate.e_score_correction_bias`, float [E], and
`pending_tokens_per_expert`, int64 [E] or None before the first, to which the module adds the picks of each
training forward, and of nothing else: no evaluation, no recomputation. Nothing is read on the host.

Source: arXiv:2408.15664, algorithm 1. Axes: L mixture layers, E experts (global).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_npu_tp.errors import ConfigError


def biased_blocks(root: nn.Module) -> dict[str, Any]:
    """The modules inside `root` whose bias can be updated, by qualified name, in the model's order."""
    return {
        name: module
        for name, module in root.named_modules()
        if hasattr(module, "pending_tokens_per_expert")
        and getattr(getattr(module, "gate", None), "e_score_correction_bias", None) is not None
    }


@torch.no_grad()
def update_bias(blocks: Sequence[Any], rate: float, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
    """Add rate * sign(mean load - load) to the bias of every block; then forget the pending counts.

    blocks: as `biased_blocks` finds them, in the same order on every rank, all with the same number of
            experts.
    rate:   size of the step; scores lie between 0 and 1.
    reduce: sums int64 [L, E] over every rank whose tokens differ, into a tensor of its own or in place;
            None for a single process. Called once. A sum that counts every token equally often will do:
            the sign does not change.

    An even expert stays, and so do all where nothing was counted. Raises ConfigError for blocks of
    different sizes.
    """
    if not blocks:
        return
    biases = [block.gate.e_score_correction_bias for block in blocks]
    sizes = sorted({len(bias_E) for bias_E in biases})
    if len(sizes) > 1:
        raise ConfigError(f"mixture layers with {sizes} experts cannot be balanced together. Give all the same number.")
    # A rank whose block never ran takes part in the sum all the same.
    counts_LE = torch.stack(
        [
            torch.zeros_like(bias_E, dtype=torch.int64) if counts_E is None else counts_E
            for bias_E, counts_E in zip(biases, (block.pending_tokens_per_expert for block in blocks), strict=True)
        ]
    )
    if reduce is not None:
        counts_LE = reduce(counts_LE)
    # Whole numbers, times E: mean and load are compared exactly, on every rank alike.
    direction_LE = (counts_LE.sum(dim=1, keepdim=True) - sizes[0] * counts_LE).sign()
    steps = list((rate * direction_LE.to(biases[0].dtype)).unbind())
    torch._foreach_add_(biases, steps)
    clear_pending(blocks)


@torch.no_grad()
def clear_pending(blocks: Sequence[Any]) -> None:
    """Forget the counts of an optimizer step that was broken off, refused, or was none (a warm-up)."""
    pending = [block.pending_tokens_per_expert for block in blocks if block.pending_tokens_per_expert is not None]
    if pending:
        torch._foreach_zero_(pending)
