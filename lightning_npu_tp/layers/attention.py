"""Scaled dot-product attention whose values may be narrower than its keys, as in latent attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(
    q_BHSE: Tensor, k_BHLE: Tensor, v_BHLV: Tensor, *, mask: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """Causal attention without a mask, else attention where the mask is True.

    q, k: local [B, H, S, E], [B, H, L, E]. v: local [B, H, L, V] with V <= E. mask: bool [B or 1, 1, S, L].
    Returns local [B, H, S, V].
    """
    value_dim = v_BHLV.shape[-1]
    # One query over a cache sees all keys; is_causal would align it with the first.
    causal = mask is None and q_BHSE.shape[2] > 1
    # The CPU's flash kernel wants equal widths and is 2.5 times faster than what it falls to.
    widen = q_BHSE.shape[-1] - value_dim if q_BHSE.device.type == "cpu" else 0
    if widen:
        v_BHLV = F.pad(v_BHLV, (0, widen))
    out = F.scaled_dot_product_attention(
        q_BHSE, k_BHLE, v_BHLV, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=causal
    )
    return out[..., :value_dim] if widen else out
