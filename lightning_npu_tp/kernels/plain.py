"""What the layers compute where the device has no kernel of its own for it: plain PyTorch, on any device.

The reference that fused kernels are held against, and what they fall to outside their limits. The shapes of
arguments and results are the contract for every other implementation of the same operation.

Axes: B batch, S query length, L key length, H query heads, K key heads, E head size, V value size, R rope
size, N rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """X / sqrt(mean(x^2) + eps) * weight, normalised in at least float32 as transformers does.

    x: [..., D]. weight: [D]. Returns the shape of x in the dtype that weight * x has.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.rms_norm(x.to(wide), weight.shape, eps=eps)
    return weight * normed.to(x.dtype)


def swiglu(gate_up_NG: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension; [N, 2F] -> [N, F]."""
    gate_NF, up_NF = gate_up_NG.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate pairs of the last dimension: neighbours (DeepSeek) or element i of both halves (Llama and kin).

    x: [B, S, H, R]. cos, sin: [B or 1, S, R/2]. Returns [B, S, H, R] in x's dtype, rotated in cos's.
    """
    return (rotate_interleaved if interleaved else rotate_halves)(x, cos, sin)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), …; see `rotate`."""
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x0, x[R/2]), (x1, x[R/2 + 1]), …; see `rotate`."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def mark_outside(values: Tensor, ids: Tensor, is_outside: Tensor, *, what: str, vocab_size: int) -> Tensor:
    """Make NaN what was computed from ids outside of the vocabulary: on any device, and nothing is read on the host.

    values: [*ids, …], floating point. ids, is_outside: int64 and bool of one shape. The other two: see vocabulary.py.
    """
    return values.masked_fill(is_outside.reshape(is_outside.shape + (1,) * (values.ndim - ids.ndim)), torch.nan)


def attend(
    q_BHSE: Tensor, k_BKLE: Tensor, v_BKLV: Tensor, *, mask: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """Causal attention without a mask, else attention where the mask is True.

    q: local [B, H, S, E]. k: local [B, K, L, E], K a divisor of H. v: local [B, K, L, V] with V <= E.
    mask: bool [B or 1, 1, S, L], or what is added to the scores. Returns local [B, H, S, V].
    """
    queries_per_key = q_BHSE.shape[1] // k_BKLE.shape[1]
    if queries_per_key > 1:
        k_BKLE, v_BKLV = (x.repeat_interleave(queries_per_key, dim=1) for x in (k_BKLE, v_BKLV))
    value_dim = v_BKLV.shape[-1]
    # One query over a cache sees all keys; is_causal would align it with the first.
    causal = mask is None and q_BHSE.shape[2] > 1
    # The CPU's flash kernel wants equal widths and is 2.5 times faster than what it falls to; Ascend's wants them too.
    widen = q_BHSE.shape[-1] - value_dim if q_BHSE.device.type != "cuda" else 0
    if widen:
        v_BKLV = F.pad(v_BKLV, (0, widen))
    out = F.scaled_dot_product_attention(
        q_BHSE, k_BKLE, v_BKLV, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=causal
    )
    return out[..., :value_dim] if widen else out
