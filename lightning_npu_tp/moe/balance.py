"""Auxiliary losses that keep experts evenly used: per sequence, and over the whole batch.

Both are sum over experts of f_e * P_e: f is the share of picks that went to the expert, scaled so that
an even spread is 1 (no gradient), P its mean score (with gradient). An even router scores 1. Pure
arithmetic on one rank's routing: tokens are replicated over tensor ranks and the scores are computed
before any rank's own region begins, so each rank has the whole loss and its whole gradient, once.

Axes: B sequences, S tokens of each, K picks per token, E experts (global).
"""

from __future__ import annotations

from torch import Tensor


def _picks_and_scores(scores_BSE: Tensor, experts_BSK: Tensor, mask_BS: Tensor | None) -> tuple[Tensor, ...]:
    """Per sequence: picks of each expert [B, E], summed scores [B, E], number of tokens that count [B]."""
    if mask_BS is None:
        counted_BS = scores_BSE.new_ones(scores_BSE.shape[:2])
    else:
        counted_BS = mask_BS.to(scores_BSE.dtype)
    ones_BN = counted_BS[:, :, None].expand_as(experts_BSK).flatten(1)
    picks_BE = scores_BSE.new_zeros(len(scores_BSE), scores_BSE.shape[2])
    picks_BE = picks_BE.scatter_add(1, experts_BSK.flatten(1), ones_BN)
    return picks_BE, (scores_BSE * counted_BS[:, :, None]).sum(1), counted_BS.sum(1)


def sequence_balance_loss(scores_BSE: Tensor, experts_BSK: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """Mean over sequences of each sequence's balance loss.

    scores_BSE: router scores, at least float32. experts_BSK: int64 global ids.
    mask_BS: true for tokens that count; None counts all. A sequence without any is left out of the mean.
    Returns a scalar without the factor alpha. Gradient: to the scores.
    Source: the expert-level loss of arXiv:2405.04434 (equation 23) taken per sequence, `seq_aux` in the
    code published with the checkpoint.
    """
    num_experts, num_picks = scores_BSE.shape[2], experts_BSK.shape[2]
    picks_BE, sums_BE, tokens_B = _picks_and_scores(scores_BSE, experts_BSK, mask_BS)
    # Without tokens both sums are zero, so any divisor does.
    divisor_B1 = tokens_B.clamp(min=1)[:, None]
    share_BE = picks_BE * num_experts / (num_picks * divisor_B1)
    loss_B = (share_BE * (sums_BE / divisor_B1)).sum(1)
    return loss_B.sum() / (tokens_B > 0).sum().clamp(min=1)


def batch_balance_loss(scores_BSE: Tensor, experts_BSK: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """Balance loss of all tokens of the batch together.

    Arguments, result and gradient as `sequence_balance_loss`; zero if no token counts.
    Source: the same loss with `seq_aux` false.
    """
    num_experts, num_picks = scores_BSE.shape[2], experts_BSK.shape[2]
    picks_BE, sums_BE, tokens_B = _picks_and_scores(scores_BSE, experts_BSK, mask_BS)
    tokens = tokens_B.sum().clamp(min=1)
    return (picks_BE.sum(0) * num_experts / (num_picks * tokens) * (sums_BE.sum(0) / tokens)).sum()
