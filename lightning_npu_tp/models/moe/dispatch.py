"""Dispatchers: how tokens reach the ranks that hold their experts, and come back. They hold no parameters.

`Replicated` is for tokens that all expert ranks see (tensor parallelism): nothing is exchanged, each
rank computes its own experts' part, and the owner sums the parts. `AllToAll` is for ranks with tokens
of their own: counts first, then rows, and back; one host sync per call.

Axes: T tokens, K picks per token, N = T*K picks, M rows received, D hidden, E experts of one rank,
P ranks of the expert group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_npu_tp.kernels.rows import MOVES, PickRows, RowMoves, sort_picks
from lightning_npu_tp.parallel.collectives import group_rank, group_size, start_exchange
from lightning_npu_tp.parallel.forward_pass import Remember, at_once

GroupProvider = Callable[[], dist.ProcessGroup | None]
Meanwhile = Callable[[], Any]


def one_process() -> None:
    """The group provider of a model that is not sharded."""
    return None


def nothing() -> None:
    """Do nothing: the default for work that overlaps an exchange."""


class Experts(Protocol):
    """What a dispatcher feeds with tokens: this rank's experts, as `RoutedExperts` are."""

    @property
    def num_local(self) -> int:
        """How many experts this rank has, which lie next to each other in the global numbering."""
        ...

    def __call__(self, x_TD: Tensor, weights_TK: Tensor, rows: PickRows) -> Tensor:
        """Sum over each token's picks that are here of weight * expert(token), [T, D] in the dtype of `x_TD`."""
        ...


class Replicated:
    """Tokens are the same on all ranks of the group; static shapes, no communication, no host sync.

    group: looked up at each call, since a trainer may rebuild process groups between fits.
    """

    name = "replicated"

    def __init__(self, group: GroupProvider = one_process) -> None:
        self.group = group

    def __call__(
        self,
        x_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        experts: Experts,
        meanwhile: Meanwhile = nothing,
        remember: Remember[Any] = at_once,
    ) -> tuple[Tensor, Any]:
        """This rank's experts' part, [T, D], and what `meanwhile()` returned.

        Gradients of tokens and weights are this rank's part too.
        """
        first = group_rank(self.group()) * experts.num_local
        y_TD = experts(x_TD, weights_TK, sort_picks(experts_TK, first=first, num_local=experts.num_local))
        return y_TD, meanwhile()


class AllToAll:
    """Each rank of the group has tokens of its own; rows travel to the experts and back.

    group: looked up at each call. Numbers of tokens may differ between ranks, zero included.
    moves: how the device sorts tokens into rows and sums rows back.
    """

    name = "all_to_all"

    def __init__(self, group: GroupProvider = one_process, moves: RowMoves = MOVES) -> None:
        self.group = group
        self.moves = moves

    def __call__(
        self,
        x_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        experts: Experts,
        meanwhile: Meanwhile = nothing,
        remember: Remember[Any] = at_once,
    ) -> tuple[Tensor, Any]:
        """The complete result for this rank's tokens, [T, D], and what `meanwhile()` returned while rows travelled.

        Gradients are complete as well. The routing weights stay at home: they are applied when the rows
        are back. remember: of the forward pass; a second run exchanges no counts.
        """
        group, num_local = self.group(), experts.num_local
        picks = sort_picks(experts_TK, first=0, num_local=group_size(group) * num_local)
        sent_PE = picks.groups.counts_E.view(group_size(group), num_local)
        received_PE, send_rows, recv_rows = remember(lambda: _exchange_counts(sent_PE, group))
        # What has been sent or computed with is not named, so that it does not outlive its use.
        arriving = start_exchange(self.moves.tokens_to_rows(x_TD, picks), send_rows, recv_rows, group)
        aside = meanwhile()
        x_MD = arriving.wait()
        # Received rows are sorted by source and then by expert; each is a token with one pick here.
        local_PE = torch.arange(num_local, device=x_TD.device).repeat(group_size(group))
        expert_M = torch.repeat_interleave(local_PE, received_PE.reshape(-1), output_size=len(x_MD))
        arrived = sort_picks(expert_M[:, None], first=0, num_local=num_local)
        y_MD = experts(x_MD, weights_TK.new_ones(len(x_MD), 1), arrived)
        del arriving, x_MD
        returning = start_exchange(y_MD, recv_rows, send_rows, group)
        del y_MD
        y_ND = returning.wait()
        return self.moves.rows_to_tokens(y_ND, weights_TK, picks).to(x_TD.dtype), aside


def _exchange_counts(sent_PE: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, list[int], list[int]]:
    """Rows to expect from each rank for each local expert; rows to send and to receive by rank, on the host."""
    received_PE = sent_PE
    if group_size(group) > 1:
        received_PE = torch.empty_like(sent_PE)
        dist.all_to_all_single(received_PE, sent_PE, group=group)
    # The one host sync: the receive buffer and both lists of splits need their sizes on the host.
    send_rows, recv_rows = torch.stack([sent_PE.sum(1), received_PE.sum(1)]).tolist()
    return received_PE, send_rows, recv_rows
