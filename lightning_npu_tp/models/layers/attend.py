"""Attention of one layer: by the device's kernel, or by its definition where the weights are to be shown.

Axes: B batch, S query length, L key length, H local query heads, K local key heads, E head size, V value size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_npu_tp.parallel.collectives import gather_last_dim, group_size
from lightning_npu_tp.parallel.forward_pass import ForwardPass


def attend(
    layer: Any,
    q_BHSE: Tensor,
    k_BKLE: Tensor,
    v_BKLV: Tensor,
    *,
    mask: Tensor | None,
    step: ForwardPass | None,
) -> Tensor:
    """What the layer's heads see; see `kernels.plain.attend` for shapes.

    layer: has kernels, scaling, attention_dropout, region and training.
    step:  may show "attentions", global [B, heads, S, L], which no kernel gives.
    """
    dropout = layer.attention_dropout if layer.training else 0.0
    if step is None or "attentions" not in step.shown:
        return layer.kernels.attend(q_BHSE, k_BKLE, v_BKLV, mask=mask, scale=layer.scaling, dropout=dropout)
    queries_per_key = q_BHSE.shape[1] // k_BKLE.shape[1]
    k_BHLE, v_BHLV = (x.repeat_interleave(queries_per_key, dim=1) for x in (k_BKLE, v_BKLV))
    scores_BHSL = q_BHSE @ k_BHLE.transpose(2, 3) * layer.scaling
    if mask is None:
        length, keys = scores_BHSL.shape[2:]
        mask = torch.ones(length, keys, dtype=torch.bool, device=scores_BHSL.device).tril(keys - length)
    if mask.dtype == torch.bool:
        scores_BHSL = scores_BHSL.masked_fill(~mask, float("-inf"))
    else:
        scores_BHSL = scores_BHSL + mask
    wide = torch.promote_types(q_BHSE.dtype, torch.float32)
    weights_BHSL = F.dropout(scores_BHSL.softmax(-1, dtype=wide).to(q_BHSE.dtype), dropout)
    group = layer.region.groups.tensor()
    sizes = [q_BHSE.shape[1]] * group_size(group)
    step.show("attentions", gather_last_dim(weights_BHSL.movedim(1, -1), sizes, group).movedim(-1, 1))
    return weights_BHSL @ v_BHLV
