"""Token-weighted loss and perplexity, as torchmetrics.

Both sum negative log-likelihoods and count tokens, so that a short last batch, or one with few labels,
weighs what it holds. They never see logits: the model hands out summed losses.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


class TokenLoss(Metric):
    """Mean negative log-likelihood per counted token, in nats; NaN before any token was counted."""

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    nll: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", default=torch.tensor(0.0), dist_reduce_fx="sum")
        # Integers: float32 stops counting at 16.8 million tokens.
        self.add_state("tokens", default=torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, nll: Tensor, tokens: Tensor) -> None:
        """nll: scalar, summed over the counted tokens. tokens: scalar, their number."""
        self.nll = self.nll + nll.detach()
        self.tokens = self.tokens + tokens

    @override
    def compute(self) -> Tensor:
        """Nats per token over everything seen since the last reset."""
        return self.nll / self.tokens


class TokenPerplexity(TokenLoss):
    """Exponential of the token-weighted mean negative log-likelihood."""

    @override
    def compute(self) -> Tensor:
        """Perplexity over everything seen since the last reset."""
        return super().compute().exp()
