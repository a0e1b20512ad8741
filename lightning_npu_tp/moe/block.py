"""The mixture-of-experts block: router, dispatch, routed experts and shared experts.

Child names are those of transformers' block, so checkpoints fit. With tokens replicated over the
group, the router runs on every rank alike; tokens and routing weights then enter the ranks' own region
together, and routed and shared parts leave it in one reduction. That makes every gradient complete:
the router's through its weights' summed gradient, the tokens' from both ways. Knows no model family.

Axes: B sequences, S tokens of each, T = B*S, K picks per token, D hidden, E experts (global).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_npu_tp.collectives import copy_to_group, group_size, reduce_from_group
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.kernels import Kernels
from lightning_npu_tp.layout import divisors
from lightning_npu_tp.moe.balance import batch_balance_loss, sequence_balance_loss
from lightning_npu_tp.moe.dispatch import AllToAll, GroupProvider, Replicated, one_process
from lightning_npu_tp.moe.experts import RoutedExperts
from lightning_npu_tp.moe.router import Routing, TopKRouter


class MoEBlock(nn.Module):
    """Routed and shared experts, divided by number over the ranks of a group.

    Parameters are created on the current default device (meta works): `gate.weight` whole,
    `experts.*` for this rank's E / group size experts. The owner may put others in their place, local
    tensors or DTensors of global shape split over the group (`adopt_parameters`).

    aux_loss: after a training forward with aux_loss_alpha > 0, alpha times the balance loss of this
        forward, a scalar with gradient; else None. The same on all ranks of the group. Whoever computes
        the training loss adds it there, once per rank, so that it takes part in every scaling: of
        accumulation, of mixed precision. Activation checkpointing must be the non-reentrant kind:
        the reentrant one runs this forward without gradient.
    token_mask: [B, S], true for the tokens that the balance loss counts; set by the owner before a
        forward, or passed to it. None counts all.
    tokens_per_expert: int64 [E], the picks of the last forward by expert, all tokens counted; on the
        device, read it when a sync does not hurt.

    group:          ranks that divide the experts and see the same tokens; looked up at each use.
    shared_experts: module whose forward returns this rank's partial sum [B, S, D] (on one rank: the
                    whole); its input has entered the region already.
    dispatcher:     None is `Replicated(group)`; with `AllToAll` the tokens differ from rank to rank, and
                    `group` is only the shared experts' group.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        expert_width: int,
        num_experts: int,
        top_k: int,
        kernels: Kernels,
        group: GroupProvider = one_process,
        dispatcher: Replicated | AllToAll | None = None,
        shared_experts: nn.Module | None = None,
        topk_method: str = "greedy",
        num_groups: int = 1,
        topk_group: int = 1,
        norm_topk_prob: bool = False,
        routed_scaling_factor: float = 1.0,
        hidden_act: str = "silu",
        aux_loss_alpha: float = 0.0,
        seq_aux: bool = True,
    ) -> None:
        super().__init__()
        self.group = group
        self.dispatcher = dispatcher or Replicated(group)
        num_ranks = group_size(self.dispatcher.group())
        if num_experts % num_ranks:
            raise ConfigError(
                f"expert_parallel_size={num_ranks} does not divide the {num_experts} experts. "
                f"Set strategy.expert_parallel_size to one of {divisors(num_experts)}."
            )
        self.num_experts = num_experts
        self.aux_loss_alpha = aux_loss_alpha
        self.seq_aux = seq_aux
        self.aux_loss: Tensor | None = None
        self.token_mask: Tensor | None = None
        self.tokens_per_expert: Tensor | None = None
        self.gate = TopKRouter(
            hidden_size=hidden_size,
            num_experts=num_experts,
            top_k=top_k,
            topk_method=topk_method,
            num_groups=num_groups,
            topk_group=topk_group,
            norm_topk_prob=norm_topk_prob,
            routed_scaling_factor=routed_scaling_factor,
        )
        self.experts = RoutedExperts(
            hidden_size=hidden_size,
            expert_width=expert_width,
            num_local_experts=num_experts // num_ranks,
            kernels=kernels,
            hidden_act=hidden_act,
        )
        self.shared_experts = shared_experts

    def adopt_parameters(self, source: nn.Module) -> None:
        """Take over the parameters of a block with transformers' names, whole, for the owner to split."""
        self.gate.weight = source.get_parameter("gate.weight")
        self.experts.gate_up_proj = source.get_parameter("experts.gate_up_proj")
        self.experts.down_proj = source.get_parameter("experts.down_proj")

    def forward(self, hidden_BSD: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """hidden_BSD: [B, S, D], replicated over the group. Returns the same shape and dtype.

        Gradient: complete on every rank for the input and the router; each rank's own experts'.
        """
        routing = self.gate(hidden_BSD.flatten(0, 1))
        self._record(routing, hidden_BSD.shape[:2], self.token_mask if token_mask is None else token_mask)
        group, weights_TK = self.group(), routing.weights_TK
        if self.dispatcher.is_partial:
            entered_BSD, weights_TK = copy_to_group(hidden_BSD, weights_TK, group=group)
            routed_in_BSD = entered_BSD
        else:
            entered_BSD, routed_in_BSD = copy_to_group(hidden_BSD, group=group), hidden_BSD
        routed_BSD = self.dispatcher(routed_in_BSD.flatten(0, 1), weights_TK, routing.experts_TK, self.experts).view_as(
            hidden_BSD
        )
        shared_BSD = None if self.shared_experts is None else self.shared_experts(entered_BSD)
        if self.dispatcher.is_partial:
            partial_BSD = routed_BSD if shared_BSD is None else routed_BSD + shared_BSD
            return reduce_from_group(partial_BSD, group).to(hidden_BSD.dtype)
        if shared_BSD is not None:
            routed_BSD = routed_BSD + reduce_from_group(shared_BSD, group)
        return routed_BSD.to(hidden_BSD.dtype)

    def _record(self, routing: Routing, shape_BS: torch.Size, mask_BS: Tensor | None) -> None:
        picks_N = routing.experts_TK.reshape(-1)
        counts_E = torch.zeros(self.num_experts, dtype=torch.int64, device=picks_N.device)
        self.tokens_per_expert = counts_E.scatter_add_(0, picks_N, torch.ones_like(picks_N))
        self.aux_loss = None
        if self.training and self.aux_loss_alpha > 0:
            balance_loss = sequence_balance_loss if self.seq_aux else batch_balance_loss
            loss = balance_loss(
                routing.scores_TE.unflatten(0, shape_BS), routing.experts_TK.unflatten(0, shape_BS), mask_BS
            )
            self.aux_loss = self.aux_loss_alpha * loss

    def __getstate__(self) -> dict[str, Any]:
        # What one forward left behind belongs to its step: a copy (weight averaging, checkpoints of whole
        # modules) starts without, and a tensor with a graph could not be copied.
        return {**self.__dict__, "aux_loss": None, "token_mask": None, "tokens_per_expert": None}
