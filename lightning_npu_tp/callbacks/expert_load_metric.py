"""`ExpertLoad`: how evenly the experts are used, and whether any pick got lost, as a torchmetric.

Counts only; where the counts come from and what is drawn of them is the callback's business
(`lightning_npu_tp.callbacks.ExpertLoadMonitor`).

Axes: L mixture layers, E experts (global).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


def expert_load(counts_LE: Tensor, num_picks: Tensor) -> dict[str, Tensor]:
    """Turn counts of picks into each layer's load, its spread and what was dropped.

    counts_LE: int64, picks of each expert in each layer.
    num_picks: int64 scalar, the picks that each layer was to make: tokens times picks per token.

    The answer holds
        tokens        int64 [L, E], the counts;
        max_over_mean [L], load of the busiest expert over the even load: 1 even, E collapsed; NaN where
                      nothing was counted;
        entropy       [L], of the shares, over that of even ones: 1 even, 0 collapsed; E is at least 2;
        dropped       int64 [L], picks expected and not counted; negative where some counted twice.
    """
    num_experts = counts_LE.shape[1]
    # float32 stops counting at 16.8 million.
    load_LE = counts_LE.double()
    total_L1 = load_LE.sum(dim=1, keepdim=True)
    share_LE = load_LE / total_L1
    return {
        "tokens": counts_LE,
        "max_over_mean": share_LE.amax(dim=1) * num_experts,
        "entropy": torch.special.entr(share_LE).sum(dim=1) / math.log(num_experts),
        "dropped": num_picks - counts_LE.sum(dim=1),
    }


class ExpertLoad(Metric):
    """Tokens per expert and layer, max/mean ratio, entropy and dropped picks, over everything seen.

    num_layers, num_experts: of mixture layers, and of each layer's experts.

    Over ranks the counts add up; each rank passes the picks of its own tokens.
    """

    full_state_update = False
    is_differentiable = False
    counts_LE: Tensor
    num_picks: Tensor

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.add_state("counts_LE", torch.zeros(num_layers, num_experts, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_picks", torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, counts_LE: Tensor, num_picks: int | Tensor) -> None:
        """counts_LE: int64, picks by expert. num_picks: what each layer should have picked; read nowhere."""
        self.counts_LE = self.counts_LE + counts_LE
        self.num_picks = self.num_picks + num_picks

    @override
    def compute(self) -> dict[str, Tensor]:
        """See `expert_load`; torchmetrics drops the axis L where it is 1."""
        return expert_load(self.counts_LE, self.num_picks)
