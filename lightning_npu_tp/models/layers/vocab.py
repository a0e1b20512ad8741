"""Embedding, output head and cross-entropy with the vocabulary split over the tensor ranks.

Each rank holds a slice of the vocabulary. The loss never holds logits of [tokens, vocabulary]: it
runs over chunks of tokens, keeps one log-sum-exp per token and computes the logits again in the
backward pass, which costs one more matmul of the head and saves its whole activation. The ranks
meet once per loss, over two numbers per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_npu_tp.parallel.collectives import gather_last_dim, group_rank, group_size
from lightning_npu_tp.parallel.forward_pass import ForwardPass
from lightning_npu_tp.parallel.plan import chunk_bounds
from lightning_npu_tp.parallel.tensor_region import Region, local

IGNORED_LABEL = -100
# Logits of one chunk in float32; small enough for a CPU's cache hierarchy and nothing on a card.
_CHUNK_BYTES = 64 * 2**20


class VocabEmbedding(nn.Module):
    """Look up ids in the local slice, zero where the id is another rank's, sum over the ranks.

    weight: global [V, D], local [~V/t, D]. The row of `padding_idx` gets no gradient.
    """

    def __init__(self, source: nn.Embedding, region: Region) -> None:
        super().__init__()
        self.weight = source.weight
        self.num_embeddings = source.num_embeddings
        self.padding_idx = source.padding_idx
        self.region = region

    @override
    def forward(self, ids: Tensor, step: ForwardPass | None = None) -> Tensor:
        """ids: [B, S] global ids, replicated; returns [B, S or slice, D]."""
        group = self.region.groups.tensor()
        if group is None:
            return F.embedding(ids, local(self.weight), self.padding_idx)
        start, stop = chunk_bounds(self.num_embeddings, group_rank(group), group_size(group))
        foreign = (ids < start) | (ids >= stop)
        rows = F.embedding((ids - start).masked_fill(foreign, 0), local(self.weight))
        if self.padding_idx is not None:
            # Its value stays, its gradient goes: `embedding`'s own padding_idx would hit a foreign row 0.
            padding = (ids == self.padding_idx)[..., None]
            rows = torch.where(padding, rows.detach(), rows)
        return (self.region if step is None else step.region).leave(rows.masked_fill(foreign[..., None], 0))


class VocabHead(nn.Module):
    """Output head on this rank's slice of the vocabulary.

    weight: global [V, D], local [~V/t, D].
    """

    def __init__(self, source: nn.Linear, region: Region) -> None:
        super().__init__()
        self.weight = source.weight
        self.bias = source.bias
        self.vocab_size = source.out_features
        self.region = region

    @override
    def forward(self, hidden: Tensor, step: ForwardPass | None = None) -> Tensor:
        """hidden: [B, S or slice, D]; returns logits [B, S, V], gathered on every rank, differentiable."""
        return self.logits((self.region if step is None else step.region).enter(hidden))

    def logits(self, entered: Tensor) -> Tensor:
        """Logits [..., V], gathered on every rank, of activations [..., D] that have entered the region."""
        group = self.region.groups.tensor()
        bias = None if self.bias is None else local(self.bias)
        logits = F.linear(entered, local(self.weight), bias)
        ranks = group_size(group)
        bounds = [chunk_bounds(self.vocab_size, rank, ranks) for rank in range(ranks)]
        return gather_last_dim(logits, [stop - start for start, stop in bounds], group)

    def token_losses(self, hidden: Tensor, labels: Tensor, ignore_index: int = IGNORED_LABEL) -> Tensor:
        """Cross-entropy per token without gathering logits.

        hidden: [T, D], has entered the region. labels: [T] global ids, ignore_index counts nothing.
        Returns [T] nats in at least float32, zero where ignored; replicated.
        """
        group = self.region.groups.tensor()
        weight = local(self.weight)
        bias = None if self.bias is None else local(self.bias)
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        start, _ = chunk_bounds(self.vocab_size, group_rank(group), group_size(group))
        return _VocabCrossEntropy.apply(hidden, weight, bias, labels, labels != ignore_index, start, group)


def _chunk_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype) -> Tensor:
    logits = F.linear(hidden, weight).to(wide)
    return logits if bias is None else logits + bias.to(wide)


def _local_targets(labels: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Column of each label in the local slice (0 where foreign or ignored) and whether it is here."""
    here = (labels >= start) & (labels < start + size)
    return (labels - start).masked_fill(~here, 0), here


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        counted_T: Tensor,
        start: int,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        columns_T, here_T = _local_targets(labels_T, start, weight_VD.shape[0])
        chunk = max(1, _CHUNK_BYTES // (weight_VD.shape[0] * 4))
        with torch.autocast(hidden_TD.device.type, enabled=False):
            lse, target = [], []
            for rows in range(0, hidden_TD.shape[0], chunk):
                piece = slice(rows, rows + chunk)
                logits = _chunk_logits(hidden_TD[piece], weight_VD, bias_V, wide)
                lse.append(logits.logsumexp(-1))
                target.append(logits.gather(-1, columns_T[piece, None])[:, 0])
            lse_T = torch.cat(lse) if lse else hidden_TD.new_zeros(0, dtype=wide)
            target_T = torch.cat(target) if target else lse_T
            target_T = target_T.masked_fill(~here_T, 0)
            if group is not None:
                own_2T = torch.stack((lse_T, target_T))
                parts = [torch.empty_like(own_2T) for _ in range(group_size(group))]
                dist.all_gather(parts, own_2T, group=group)
                all_R2T = torch.stack(parts)
                lse_T, target_T = all_R2T[:, 0].logsumexp(0), all_R2T[:, 1].sum(0)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, columns_T, here_T, counted_T, lse_T)
        ctx.chunk = chunk
        return (lse_T - target_T).masked_fill(~counted_T, 0)

    @staticmethod
    @override
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, columns_T, here_T, counted_T, lse_T = ctx.saved_tensors
        wide = lse_T.dtype
        scale_T = grad_T.to(wide).masked_fill(~counted_T, 0)
        d_hidden_TD = torch.empty_like(hidden_TD)
        # Summed over chunks in the wide dtype: one rounding to the parameter's dtype at the end.
        d_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if hidden_TD.shape[0] > ctx.chunk else None
        d_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=wide)
        for rows in range(0, hidden_TD.shape[0], ctx.chunk):
            piece = slice(rows, rows + ctx.chunk)
            d_logits = _chunk_logits(hidden_TD[piece], weight_VD, bias_V, wide)
            d_logits.sub_(lse_T[piece, None]).exp_()
            d_logits.scatter_add_(-1, columns_T[piece, None], -here_T[piece, None].to(wide))
            d_logits.mul_(scale_T[piece, None])
            if d_bias_V is not None:
                d_bias_V += d_logits.sum(0)
            d_logits = d_logits.to(hidden_TD.dtype)
            torch.mm(d_logits, weight_VD, out=d_hidden_TD[piece])
            product = d_logits.t() @ hidden_TD[piece]
            d_weight_VD = product if d_weight_VD is None else d_weight_VD.add_(product)
        if d_weight_VD is None:
            d_weight_VD = torch.zeros_like(weight_VD)
        d_bias = None if d_bias_V is None else d_bias_V.to(bias_V.dtype)
        return d_hidden_TD, d_weight_VD.to(weight_VD.dtype), d_bias, None, None, None, None
