"""Auxiliary losses of the router: even use of the experts, per sequence or over the batch, and small logits.

The balance losses are sum over experts of f_e * P_e: f is the share of picks that went to the expert,
scaled so that an even spread is 1 (no gradient), P its mean score (with gradient). An even router
scores 1. Where every rank has all tokens of its sequences this is arithmetic on one rank: the scores are
computed before any rank's own region begins, so each rank has the whole loss and its whole gradient, once.
Where ranks hold slices of the sequences, `reduce` sums over them before the loss is formed: each rank
then has the whole loss, and of its gradient the part of its own slice.

Axes: B sequences, S tokens of each (this rank's slice), T = B*S, K picks per token, E experts (global).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Sums a tensor over the ranks that hold the other slices: sum forward, identity backward.
Reduce = Callable[[Tensor], Tensor]


def _sums(
    scores_BSE: Tensor, experts_BSK: Tensor, mask_BS: Tensor | None, reduce: Reduce | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Per sequence: picks of each expert [B, E], summed scores [B, E], number of tokens that count [B, 1]."""
    num_experts = scores_BSE.shape[2]
    if mask_BS is None:
        counted_BS = scores_BSE.new_ones(scores_BSE.shape[:2])
    else:
        counted_BS = mask_BS.to(scores_BSE.dtype)
    ones_BN = counted_BS[:, :, None].expand_as(experts_BSK).flatten(1)
    picks_BE = scores_BSE.new_zeros(len(scores_BSE), num_experts).scatter_add(1, experts_BSK.flatten(1), ones_BN)
    sums_BE, tokens_B1 = (scores_BSE * counted_BS[:, :, None]).sum(1), counted_BS.sum(1, keepdim=True)
    if reduce is None:
        return picks_BE, sums_BE, tokens_B1
    # Together, for one collective.
    picks_BE, sums_BE, tokens_B1 = reduce(torch.cat([picks_BE, sums_BE, tokens_B1], dim=1)).split(
        [num_experts, num_experts, 1], dim=1
    )
    return picks_BE.detach(), sums_BE, tokens_B1.detach()


def sequence_balance_loss(
    scores_BSE: Tensor, experts_BSK: Tensor, mask_BS: Tensor | None = None, *, reduce: Reduce | None = None
) -> Tensor:
    """Mean over sequences of each sequence's balance loss.

    scores_BSE: scores that sum to one over the experts (`Routing.shares_TE`), at least float32; S may be 0.
    experts_BSK: int64 global ids.
    mask_BS: true for tokens that count; None counts all. A sequence without any is left out of the mean.
    reduce:  sums a tensor over the ranks that hold the other slices of the same B sequences, with the
             identity as its gradient (`reduce_from_group`); None where this rank holds all. Called once.
    Returns a scalar without the factor alpha. Gradient: to the scores, those of this rank's slice.
    Source: the expert-level loss of arXiv:2405.04434 (equation 23) taken per sequence, `seq_aux` in the
    code published with the checkpoint.
    """
    num_experts, num_picks = scores_BSE.shape[2], experts_BSK.shape[2]
    picks_BE, sums_BE, tokens_B1 = _sums(scores_BSE, experts_BSK, mask_BS, reduce)
    # Without tokens both sums are zero, so any divisor does.
    divisor_B1 = tokens_B1.clamp(min=1)
    share_BE = picks_BE * num_experts / (num_picks * divisor_B1)
    loss_B = (share_BE * (sums_BE / divisor_B1)).sum(1)
    return loss_B.sum() / (tokens_B1 > 0).sum().clamp(min=1)


def batch_balance_loss(
    scores_BSE: Tensor, experts_BSK: Tensor, mask_BS: Tensor | None = None, *, reduce: Reduce | None = None
) -> Tensor:
    """Balance loss of all tokens of the batch together.

    Arguments, result and gradient as `sequence_balance_loss`; zero if no token counts.
    Source: the same loss with `seq_aux` false.
    """
    num_experts, num_picks = scores_BSE.shape[2], experts_BSK.shape[2]
    picks_BE, sums_BE, tokens_B1 = _sums(scores_BSE, experts_BSK, mask_BS, reduce)
    tokens = tokens_B1.sum().clamp(min=1)
    return (picks_BE.sum(0) * num_experts / (num_picks * tokens) * (sums_BE.sum(0) / tokens)).sum()


def layers_balance_loss(logits_LTE: list[Tensor], num_picks: int, mask_BS: Tensor | None = None) -> Tensor:
    """Balance loss of all tokens and all layers together, as transformers computes it for `output_router_logits`.

    logits_LTE: `Routing.logits_TE` of each mixture layer, softmax-scored and whole. mask_BS: true for tokens that
    count; None counts all.
    Returns a scalar without its factor: `num_picks` for an even spread. Gradient: to the logits.
    Source: `load_balancing_loss_func` of transformers' Mixtral, after equations 4 to 6 of arXiv:2101.03961.
    """
    scores_LTE = torch.stack(logits_LTE).softmax(dim=-1)
    experts_LTK = scores_LTE.detach().topk(num_picks, dim=-1).indices
    mask_LT = None if mask_BS is None else mask_BS.reshape(1, -1).expand(scores_LTE.shape[:2])
    return num_picks * batch_balance_loss(scores_LTE, experts_LTK, mask_LT)


def router_z_loss(logits_TE: Tensor, mask_T: Tensor | None = None, *, reduce: Reduce | None = None) -> Tensor:
    """Mean over tokens of the squared log of the sum of the exponentials of the logits.

    It keeps the logits small, where rounding them moves the scores little.

    logits_TE: `Routing.logits_TE`, at least float32; T may be 0.
    mask_T: true for tokens that count; None counts all. reduce: as in `sequence_balance_loss`.
    Returns a scalar without its factor; zero if no token counts. Gradient: to the logits.
    Source: equation 5 of arXiv:2202.08906.
    """
    squares_T = logits_TE.logsumexp(dim=1).square()
    counted_T = torch.ones_like(squares_T) if mask_T is None else mask_T.to(squares_T.dtype)
    sums_2 = torch.stack([(squares_T * counted_T).sum(), counted_T.sum()])
    if reduce is not None:
        sums_2 = reduce(sums_2)
    return sums_2[0] / sums_2[1].detach().clamp(min=1)
