"""Norm, rotation, attention and gated activation on Ascend, by torch_npu's fused operators.

Each takes and returns what its namesake in `plain.py` does, and falls to it outside of the operator's limits.
torch_npu differentiates them. Importing this file imports no torch_npu (see `npu.py`).
Source: torch_npu/_op_plugin_docs.py of 2.13.0. The range that it states for cosines, [-1, 1], is left by a
few per cent where YaRN scales them: the operator multiplies, whatever they are.

Axes: B batch, S query length, L key length, H query heads, K key heads, E head size, V value size, R rope
size, N rows, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_npu_tp.kernels import plain
from lightning_npu_tp.kernels.npu_limits import common_limits, fits

_MAX_DIMS = 8
_MAX_ROTATED = 896
_MAX_ROTATED_HEADS = 1000
_MAX_HEAD = 768
_MAX_HEADS = 256
_MAX_LENGTH = 2**20
# sparse_mode 2: causal from the upper left corner, by a mask of one size for every length.
_LEFT_UP_CAUSAL = 2
_COMPRESSED = 2048
_causal_masks: dict[torch.device, Tensor] = {}


def _norm_limits(x: Tensor, weight: Tensor) -> Iterable[tuple[bool, str]]:
    yield from common_limits(x, weight)
    pair = f"{str(x.dtype).removeprefix('torch.')} with a weight of {str(weight.dtype).removeprefix('torch.')}"
    allowed = weight.dtype == x.dtype or (x.dtype, weight.dtype) == (torch.bfloat16, torch.float32)
    yield allowed, f"{pair} is not supported by npu_rms_norm"
    yield x.dim() <= _MAX_DIMS, f"{x.dim()} dimensions; npu_rms_norm takes {_MAX_DIMS}"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `plain.rms_norm`; rounds once, after the weight, to the dtype of x."""
    if not fits("rms_norm", _norm_limits(x, weight)):
        return plain.rms_norm(x, weight, eps)
    y, _ = torch.ops.npu.npu_rms_norm(x, weight, eps)
    return y.to(torch.promote_types(x.dtype, weight.dtype))


def swiglu(gate_up_NG: Tensor) -> Tensor:
    """See `plain.swiglu`."""
    if not fits("swiglu", common_limits(gate_up_NG)):
        return plain.swiglu(gate_up_NG)
    return torch.ops.npu.npu_swiglu(gate_up_NG.contiguous(), dim=-1)


def _rotary_limits(x: Tensor, cos: Tensor) -> Iterable[tuple[bool, str]]:
    yield from common_limits(x, cos)
    heads, width = x.shape[-2:]
    yield width < _MAX_ROTATED, f"{width} rotated elements; npu_rotary_mul takes less than {_MAX_ROTATED}"
    yield heads < _MAX_ROTATED_HEADS, f"{heads} heads; npu_rotary_mul takes less than {_MAX_ROTATED_HEADS}"


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """See `plain.rotate`."""
    if not fits("rotary", _rotary_limits(x, cos)):
        return plain.rotate(x, cos, sin, interleaved=interleaved)
    batch, length, heads, width = x.shape
    # One sequence of all positions: tables per sequence are not supported between neighbours, and this way
    # the number of sequences does not count towards a limit either.
    joined = x.to(cos.dtype).reshape(1, batch * length, heads, width)
    tables = (_full_width(table.expand(batch, -1, -1), interleaved).view(1, -1, 1, width) for table in (cos, sin))
    rotated = torch.ops.npu.npu_rotary_mul(joined, *tables, "interleave" if interleaved else "half")
    return rotated.view(x.shape).to(x.dtype)


def _full_width(table_BSr: Tensor, interleaved: bool) -> Tensor:
    """A number for each element of a pair: [B, S, R/2] -> [B, S, R], contiguous."""
    if interleaved:
        return torch.stack((table_BSr, table_BSr), dim=-1).flatten(-2)
    return torch.cat((table_BSr, table_BSr), dim=-1)


def _attention_limits(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Iterable[tuple[bool, str]]:
    yield from common_limits(q, k, v)
    (heads, length, width), keys = q.shape[1:], k.shape[2]
    yield dropout == 0, "attention dropout is left to the reference"
    yield v.shape[-1] <= width <= _MAX_HEAD, f"heads of {width} and {v.shape[-1]}; at most {_MAX_HEAD} is supported"
    yield heads <= _MAX_HEADS, f"{heads} heads; npu_fusion_attention takes {_MAX_HEADS}"
    yield max(length, keys) <= _MAX_LENGTH, f"length {max(length, keys)}; npu_fusion_attention takes {_MAX_LENGTH}"


def attend(
    q_BHSE: Tensor, k_BKLE: Tensor, v_BKLV: Tensor, *, mask: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """See `plain.attend`. Packed documents come as a mask: lists of lengths would have to be read on the host."""
    if torch.is_autocast_enabled(q_BHSE.device.type):
        dtype = torch.get_autocast_dtype(q_BHSE.device.type)
        q_BHSE, k_BKLE, v_BKLV = (x.to(dtype) for x in (q_BHSE, k_BKLE, v_BKLV))
    # A user's mask of four dimensions may be what is added to the scores.
    is_added = mask is not None and mask.dtype != torch.bool
    if is_added or not fits("attention", _attention_limits(q_BHSE, k_BKLE, v_BKLV, dropout)):
        return plain.attend(q_BHSE, k_BKLE, v_BKLV, mask=mask, scale=scale, dropout=dropout)
    hidden, sparse_mode = (None if mask is None else ~mask), 0
    # Without a mask everything is seen, whatever the mode; which is right for one query over a cache.
    if mask is None and q_BHSE.shape[2] > 1:
        hidden, sparse_mode = _causal_mask(q_BHSE.device), _LEFT_UP_CAUSAL
    # Layers compute heads last: BSND is how the tensors lie in memory.
    q_BSHE, k_BLKE, v_BLKV = (x.transpose(1, 2).contiguous() for x in (q_BHSE, k_BKLE, v_BKLV))
    out_BSHV = torch.ops.npu.npu_fusion_attention(
        q_BSHE, k_BLKE, v_BLKV, q_BSHE.shape[2], "BSND", atten_mask=hidden, scale=scale, sparse_mode=sparse_mode
    )[0]
    return out_BSHV.transpose(1, 2)


def _causal_mask(device: torch.device) -> Tensor:
    """Bool [2048, 2048], true above the diagonal; 4 MiB, made once per device."""
    if device not in _causal_masks:
        # The first forward may be a validation in inference mode, whose tensors no later backward may keep.
        with torch.inference_mode(False):
            _causal_masks[device] = torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool, device=device).triu_(1)
    return _causal_masks[device]
