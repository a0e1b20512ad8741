"""The mixture-of-experts block: router, dispatch, routed experts and shared experts.

Child names are those of transformers' block, so checkpoints fit. With whole activations the router runs
on every rank alike; tokens and routing weights then enter the tensor ranks' region together, and
routed and shared parts leave it in one reduction: each rank adds its experts' part (`Replicated`) or its
share of the tokens' (`AllToAll`). With slices of the sequence the router sees this rank's slice only.
Either way every gradient is complete: the router's through its weights' summed gradient, the tokens'
from both ways. Knows no model family.

Axes: B sequences, S tokens of each, s this rank's slice of them, T = B*S, K picks per token, D hidden,
E experts (global).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.kernels import Kernels
from lightning_npu_tp.kernels.rows import PickRows
from lightning_npu_tp.models.moe.balance import batch_balance_loss, router_z_loss, sequence_balance_loss
from lightning_npu_tp.models.moe.dispatch import AllToAll, Replicated
from lightning_npu_tp.models.moe.experts import RoutedExperts
from lightning_npu_tp.models.moe.router import Routing, TopKRouter
from lightning_npu_tp.parallel.collectives import group_rank, group_size, reduce_from_group
from lightning_npu_tp.parallel.forward_pass import ForwardPass
from lightning_npu_tp.parallel.layout import Groups, divisors
from lightning_npu_tp.parallel.plan import chunk_bounds
from lightning_npu_tp.parallel.sequence import join_slices, own_slice
from lightning_npu_tp.parallel.tensor_region import Region


class MoEBlock(nn.Module):
    """Routed and shared experts, divided by number over the ranks of a group.

    Parameters are created on the current default device (meta works): `gate.weight` whole,
    `experts.*` for this rank's E / group size experts. The owner may put others in their place, local
    tensors or DTensors of global shape split over the group (`adopt_parameters`).

    In training with aux_loss_alpha or z_loss_coef above 0 each forward adds the balance loss times alpha plus the
    router's z-loss times its factor to the `balance_losses` of its ForwardPass. Whoever computes the training loss adds
    them there, once per rank, so that they take part in every scaling: of accumulation, of mixed precision.

    Its own statistics are state of the block, as those of a batch norm are; callbacks read them between steps:
    tokens_per_expert: int64 [E], the picks of the last forward by expert, without those of padding (the
        pass's token_mask); on the device, read it when a sync does not hurt. Each token is counted on one
        rank (tensor ranks that route the same tokens count a share each), so that a sum over all ranks of
        the world is the global count.
    pending_tokens_per_expert: int64 [E], the same summed over training forwards until somebody zeroes it;
        what a backward pass recomputes is not counted again.

    region:         frames the work on split parameters; None for a block that is not split.
    dispatcher:     None is `Replicated` over one process. `Replicated` needs a group of the tensor ranks.
    shared_experts: module whose forward returns this rank's partial sum [B, S, D] of activations that
                    have entered the region (on one rank: the whole).
    recompute:      "moe" keeps no hidden activations of the routed experts and computes them again in
                    the backward pass.
    router:         further settings of `TopKRouter`.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        expert_width: int,
        num_experts: int,
        top_k: int,
        kernels: Kernels,
        region: Region | None = None,
        dispatcher: Replicated | AllToAll | None = None,
        shared_experts: nn.Module | None = None,
        hidden_act: str = "silu",
        aux_loss_alpha: float = 0.0,
        seq_aux: bool = True,
        z_loss_coef: float = 0.0,
        recompute: str = "none",
        **router: Any,
    ) -> None:
        super().__init__()
        self.region = region or Region(Groups())
        self.dispatcher = dispatcher or Replicated()
        num_ranks = group_size(self.dispatcher.group())
        if num_experts % num_ranks:
            raise ConfigError(
                f"expert_parallel_size={num_ranks} does not divide the {num_experts} experts. "
                f"Set strategy.expert_parallel_size to one of {divisors(num_experts)}."
            )
        self.num_experts = num_experts
        self.aux_loss_alpha = aux_loss_alpha
        self.seq_aux = seq_aux
        self.z_loss_coef = z_loss_coef
        self.recompute = recompute
        self.tokens_per_expert: Tensor | None = None
        self.pending_tokens_per_expert: Tensor | None = None
        self.gate = TopKRouter(hidden_size=hidden_size, num_experts=num_experts, top_k=top_k, **router)
        self.experts = RoutedExperts(
            hidden_size=hidden_size,
            expert_width=expert_width,
            num_local_experts=num_experts // num_ranks,
            kernels=kernels,
            hidden_act=hidden_act,
        )
        self.shared_experts = shared_experts

    def adopt_parameters(self, source: nn.Module) -> None:
        """Take over parameters and buffers of a block with transformers' names, whole, for the owner to split."""
        self.gate.weight = source.get_parameter("gate.weight")
        self.experts.gate_up_proj = source.get_parameter("experts.gate_up_proj")
        self.experts.down_proj = source.get_parameter("experts.down_proj")
        if self.gate.e_score_correction_bias is not None:
            bias_E = getattr(source.get_submodule("gate"), "e_score_correction_bias", None)
            if bias_E is None or bias_E.is_meta:
                # No random number, so it need not wait for memory.
                bias_E = torch.zeros(self.num_experts, device="cpu")
            self.gate.e_score_correction_bias = bias_E.to(torch.promote_types(bias_E.dtype, torch.float32))

    @override
    def forward(self, hidden_BSD: Tensor, step: ForwardPass | None = None) -> Tensor:
        """hidden_BSD: [B, S or this rank's slice, D]. Returns the same shape and dtype.

        step: None for a block that is called by itself, on whole activations.
        Gradient: complete on every rank for the input and the router; each rank's own experts'.
        Raises ConfigError where the balance losses have lost their gradient.
        """
        step = step or ForwardPass(self.region)
        tokens_TD = hidden_BSD.flatten(0, 1)
        route = partial(self.gate, tokens_TD, weight=step.region.weight(self.gate))
        first = None if step.is_second_run else route()
        experts_TK = step.remember(lambda: first.experts_TK if first is not None else None)
        routing = first if first is not None else route(experts_TK=experts_TK)
        step.show("router_logits", routing.logits_TE)
        self._record(routing, hidden_BSD.shape[:2], step)
        compute = self._sliced if step.region.is_sliced and isinstance(self.dispatcher, AllToAll) else self._partial
        return compute(hidden_BSD, routing, step).to(hidden_BSD.dtype)

    def _partial(self, hidden_BSD: Tensor, routing: Routing, step: ForwardPass) -> Tensor:
        """Routed and shared parts as one partial sum over the tensor ranks."""
        region, shape = step.region, hidden_BSD.shape[:2]
        weights_BSK, experts_BSK = routing.weights_TK.unflatten(0, shape), routing.experts_TK.unflatten(0, shape)
        group = region.groups.tensor()
        entered_BSD, weights_BSK = region.enter(hidden_BSD, weights_BSK)
        if region.is_sliced:
            length = region.length
            assert length is not None and group is not None
            experts_BSK = step.remember(lambda: join_slices(routing.experts_TK.unflatten(0, shape), length, group))
        x_TD, weights_TK, experts_TK = (t.flatten(0, 1) for t in (entered_BSD, weights_BSK, experts_BSK))
        num_tokens, first, last = len(x_TD), 0, len(x_TD)
        if isinstance(self.dispatcher, AllToAll):
            # Tensor ranks see the same tokens; each sends its share of them.
            first, last = chunk_bounds(num_tokens, group_rank(group), group_size(group))
        routed_TD, shared_BSD = self.dispatcher(
            x_TD[first:last],
            weights_TK[first:last],
            experts_TK[first:last],
            self._experts,
            meanwhile=lambda: None if self.shared_experts is None else self.shared_experts(entered_BSD),
            remember=step.remember,
        )
        if last - first < num_tokens:
            routed_TD = nn.functional.pad(routed_TD, (0, 0, first, num_tokens - last))
        routed_BSD = routed_TD.view_as(entered_BSD)
        partial_BSD = routed_BSD if shared_BSD is None else routed_BSD + shared_BSD
        return region.leave(partial_BSD)

    def _sliced(self, hidden_BSD: Tensor, routing: Routing, step: ForwardPass) -> Tensor:
        """Every rank sends the tokens of its own slice; only the shared experts enter the region."""

        def shared() -> Tensor | None:
            if self.shared_experts is None:
                return None
            partial_BSD = self.shared_experts(step.region.enter(hidden_BSD))
            return step.region.leave(partial_BSD)

        routed_TD, shared_BSD = self.dispatcher(
            hidden_BSD.flatten(0, 1),
            routing.weights_TK,
            routing.experts_TK,
            self._experts,
            meanwhile=shared,
            remember=step.remember,
        )
        routed_BSD = routed_TD.view_as(hidden_BSD)
        return routed_BSD if shared_BSD is None else routed_BSD + shared_BSD

    @property
    def _experts(self) -> Any:
        return _Recomputed(self.experts) if self.recompute == "moe" and self.training else self.experts

    def _record(self, routing: Routing, shape_BS: torch.Size, step: ForwardPass) -> None:
        region, group, mask_BS = step.region, step.region.groups.tensor(), step.token_mask
        if mask_BS is not None and region.is_sliced:
            assert group is not None
            mask_BS = own_slice(mask_BS, group)
        if not step.is_second_run:
            self._count(routing.experts_TK, mask_BS, region)
        if not self.training or (self.aux_loss_alpha <= 0 and self.z_loss_coef <= 0):
            return
        reduce = partial(reduce_from_group, group=group) if region.is_sliced else None
        losses = []
        if self.aux_loss_alpha > 0:
            balance_loss = sequence_balance_loss if self.seq_aux else batch_balance_loss
            shares_BSE, experts_BSK = (
                routing.shares_TE.unflatten(0, shape_BS),
                routing.experts_TK.unflatten(0, shape_BS),
            )
            losses.append(self.aux_loss_alpha * balance_loss(shares_BSE, experts_BSK, mask_BS, reduce=reduce))
        if self.z_loss_coef > 0:
            mask_T = None if mask_BS is None else mask_BS.flatten()
            losses.append(self.z_loss_coef * router_z_loss(routing.logits_TE, mask_T, reduce=reduce))
        total = sum(losses[1:], losses[0])
        if step.has_gradient and self.gate.weight.requires_grad and not total.requires_grad:
            raise ConfigError(
                "The router's balance losses have no gradient: the layers ran under reentrant activation "
                "checkpointing, which loses it. Set strategy.recompute=block instead of transformers' own switch, or "
                "pass use_reentrant=False to that."
            )
        step.balance_losses.append(total)

    def _count(self, experts_TK: Tensor, mask_BS: Tensor | None, region: Region) -> None:
        counted_TK = torch.ones_like(experts_TK)
        if mask_BS is not None:
            # Padding is routed as well, but says nothing of what the experts learn from.
            counted_TK = counted_TK * mask_BS.reshape(-1, 1).to(counted_TK.dtype)
        group = region.groups.tensor()
        if not region.is_sliced and group is not None:
            first, last = chunk_bounds(len(experts_TK), group_rank(group), group_size(group))
            experts_TK, counted_TK = experts_TK[first:last], counted_TK[first:last]
        picks_N = experts_TK.reshape(-1)
        counts_E = torch.zeros(self.num_experts, dtype=torch.int64, device=picks_N.device)
        self.tokens_per_expert = counts_E.scatter_add_(0, picks_N, counted_TK.reshape(-1))
        if self.training:
            pending = self.pending_tokens_per_expert
            self.pending_tokens_per_expert = counts_E.clone() if pending is None else pending.add_(counts_E)

    @override
    def __getstate__(self) -> dict[str, Any]:
        # What was counted belongs to its step: a copy (weight averaging, checkpoints of whole modules) starts without.
        return {**self.__dict__, **dict.fromkeys(("tokens_per_expert", "pending_tokens_per_expert"))}


class _Recomputed:
    """Experts that keep their input only; the second run meets no other rank and no random number."""

    def __init__(self, experts: RoutedExperts) -> None:
        self._experts = experts
        self.num_local = experts.num_local

    def __call__(self, x_TD: Tensor, weights_TK: Tensor, rows: PickRows) -> Tensor:
        return checkpoint(self._experts, x_TD, weights_TK, rows, use_reentrant=False, preserve_rng_state=False)
