"""npu_fusion_attention: softmax(scale * q k^T, masked) v, in five layouts, and its gradient.

Values may be narrower than keys, and several query heads may share one key head. A mask is True where
nothing is to be seen; without one everything is seen, whatever `sparse_mode` says. Modes 2 and 3 (causal from
the upper left or the lower right corner) want the compressed mask: 2048 x 2048, True above the diagonal. TND is
sequences of several lengths one after the other, their ends in a list of the host.
Dropout, position biases, prefixes, sinks and the sparse modes above 4 are left out.
Source: torch_npu/_op_plugin_docs.py and the wheel's meta kernels.

Axes: B batch, N query heads, M key heads, S query length, L key length, E key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ascend_sim.operators.kernel import Kernel, require, require_dtype, wide

_API = "aclnnFlashAttentionScore"
_LAYOUTS = ("BSH", "SBH", "BSND", "BNSD", "TND")
_COMPRESSED = 2048
_COMPRESSED_MODES = (2, 3, 4)
_FULL = 2147483647
# Softmax statistics come eight times over, a block of 32 bytes in float32.
_COPIES = 8


@dataclass(frozen=True)
class _Masking:
    """What hides keys from queries."""

    mask: Tensor | None
    mode: int
    before: int
    after: int

    def hidden(self, queries: int, keys: int) -> Tensor | None:
        """bool, broadcastable to [B, N, S, L], True = hidden; None hides nothing."""
        if self.mask is None:
            return None
        distance = torch.arange(keys)[None, :] - torch.arange(queries)[:, None]
        if self.mode in _COMPRESSED_MODES:
            self._check_compressed()
            if self.mode == 2:
                return distance > 0
            distance = distance - (keys - queries)
            return distance > 0 if self.mode == 3 else (distance > self.after) | (-distance > self.before)
        given = self.mask.bool()[..., :queries, :keys]
        return given if self.mode == 1 else given | (distance > self.after) | (-distance > self.before)

    def _check_compressed(self) -> None:
        # A corner will do: the card takes its blocks from all over the mask, and a wrong one gives wrong numbers.
        assert self.mask is not None
        corner = self.mask[:64, :64].bool()
        right = torch.equal(corner, torch.ones_like(corner).triu(1))
        require(
            right, _API, f"sparse_mode {self.mode}: attenMask should be True above the diagonal and False elsewhere."
        )


def _heads_first(layout: str, num_heads: int) -> Callable[[Tensor], Tensor]:
    """A function to [B, heads, S, width]; TND arrives cut into sequences [S, heads, width]."""
    return {
        "BNSD": lambda t: t,
        "BSND": lambda t: t.transpose(1, 2),
        "BSH": lambda t: t.unflatten(-1, (num_heads, -1)).transpose(1, 2),
        "SBH": lambda t: t.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3),
        "TND": lambda t: t.transpose(0, 1)[None],
    }[layout]


def _heads_back(layout: str) -> Callable[[Tensor], Tensor]:
    """The inverse of `_heads_first`."""
    return {
        "BNSD": lambda t: t,
        "BSND": lambda t: t.transpose(1, 2),
        "BSH": lambda t: t.transpose(1, 2).flatten(2),
        "SBH": lambda t: t.permute(2, 0, 1, 3).flatten(2),
        "TND": lambda t: t[0].transpose(0, 1),
    }[layout]


def _key_heads(query: Tensor, key: Tensor, head_num: int, layout: str) -> int:
    if layout in ("BSH", "SBH"):
        return key.shape[-1] * head_num // query.shape[-1]
    return key.shape[1 if layout == "BNSD" else -2]


def _pieces(layout: str, ends_q: Sequence[int] | None, ends_k: Sequence[int] | None) -> Iterator[tuple[slice, slice]]:
    """Slices of the first dimension of queries and keys that are attended by themselves."""
    if layout != "TND":
        yield slice(None), slice(None)
        return
    start_q = start_k = 0
    for stop_q, stop_k in zip(ends_q or (), ends_k or (), strict=True):
        # Zeros at the end are sequences that take no part.
        if stop_q > start_q:
            yield slice(start_q, stop_q), slice(start_k, stop_k)
        start_q, start_k = max(start_q, stop_q), max(start_k, stop_k)


def _scores(q: Tensor, k: Tensor, scale: float, masking: _Masking) -> Tensor:
    """[B, N, S, L], -inf where hidden. q: [B, N, S, E]. k: [B, M, L, E]."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale
    hidden = masking.hidden(q.shape[2], k.shape[2])
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)


def fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = _FULL,
    next_tockens: int = _FULL,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """Return attention in the layout of the query, softmax max and sum, nothing, and three numbers of dropout."""
    dtype, layout = wide(query.dtype), input_layout
    into, into_kv = (_heads_first(layout, heads) for heads in (head_num, _key_heads(query, key, head_num, layout)))
    masking = _Masking(atten_mask, sparse_mode, pre_tockens, next_tockens)
    outputs, maxima, sums = [], [], []
    covered = 0
    for rows, keys in _pieces(layout, actual_seq_qlen, actual_seq_kvlen):
        q, k, v = into(query[rows].to(dtype)), into_kv(key[keys].to(dtype)), into_kv(value[keys].to(dtype))
        scores = _scores(q, k, scale, masking)
        maximum = scores.amax(-1, keepdim=True)
        weights = (scores - maximum).exp()
        total = weights.sum(-1, keepdim=True)
        out = (weights / total) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        if sparse_mode == 3:
            # More queries than keys: the first see nothing, which the card finds out by itself.
            out = out.nan_to_num(0.0)
        outputs.append(_heads_back(layout)(out))
        maxima.append(maximum)
        sums.append(total)
        covered += q.shape[2] if layout == "TND" else 0
    stats = [torch.cat([t[0].transpose(0, 1) for t in part]) if layout == "TND" else part[0] for part in (maxima, sums)]
    attention = torch.cat(outputs)
    if layout == "TND" and covered < len(query):
        rest = attention.new_full((len(query) - covered, *attention.shape[1:]), torch.nan)
        attention = torch.cat((attention, rest))
        stats = [torch.cat((s, s.new_full((len(query) - covered, *s.shape[1:]), torch.nan))) for s in stats]
    maximum, total = (s.expand(*s.shape[:-1], _COPIES).contiguous() for s in stats)
    return attention.to(query.dtype).contiguous(), maximum, total, query.new_empty(0), 0, 0, 0


def fusion_attention_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    *,
    atten_mask: Tensor | None = None,
    softmax_max: Tensor | None = None,
    softmax_sum: Tensor | None = None,
    attention_in: Tensor | None = None,
    scale_value: float = 1.0,
    pre_tockens: int = _FULL,
    next_tockens: int = _FULL,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, and two empty ones of what is left out.

    The softmax is computed again from the statistics that the forward kept.
    """
    assert softmax_max is not None and softmax_sum is not None
    dtype, layout = wide(query.dtype), input_layout
    key_heads = _key_heads(query, key, head_num, layout)
    into, into_kv, back = _heads_first(layout, head_num), _heads_first(layout, key_heads), _heads_back(layout)
    masking = _Masking(atten_mask, sparse_mode, pre_tockens, next_tockens)
    gradients = [torch.zeros_like(tensor, dtype=dtype) for tensor in (query, key, value)]
    for rows, keys in _pieces(layout, actual_seq_qlen, actual_seq_kvlen):
        q, k, v = into(query[rows].to(dtype)), into_kv(key[keys].to(dtype)), into_kv(value[keys].to(dtype))
        dout = into(dy[rows].to(dtype))
        maximum, total = (_statistic(s, layout, rows) for s in (softmax_max, softmax_sum))
        weights = (_scores(q, k, scale_value, masking) - maximum).exp() / total
        if sparse_mode == 3:
            weights = weights.nan_to_num(0.0)
        group = q.shape[1] // k.shape[1]
        dweights = dout @ v.repeat_interleave(group, 1).transpose(-1, -2)
        dscores = weights * (dweights - (dweights * weights).sum(-1, keepdim=True)) * scale_value
        dq = dscores @ k.repeat_interleave(group, 1)
        dk, dv = (
            grad.unflatten(1, (key_heads, group)).sum(2)
            for grad in (dscores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ dout)
        )
        for gradient, part, where in zip(gradients, (dq, dk, dv), (rows, keys, keys), strict=True):
            gradient[where] = back(part)
    dquery, dkey, dvalue = (g.to(t.dtype) for g, t in zip(gradients, (query, key, value), strict=True))
    return dquery, dkey, dvalue, query.new_empty(0), query.new_empty(0)


def _statistic(kept: Tensor, layout: str, rows: slice) -> Tensor:
    """[B, N, S, 1] of what the forward returned."""
    return kept[rows].transpose(0, 1)[None, ..., :1] if layout == "TND" else kept[..., :1]


_CHECKED_MODES = (0, 1, 2, 3, 4)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = _FULL,
    next_tockens: int = _FULL,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    *_: Any,
) -> None:
    left_out = {"pse": pse, "padding_mask": padding_mask, "prefix": prefix, "sink": sink, "dropout_mask": dropout_mask}
    given = [name for name, value in left_out.items() if value is not None]
    given += ["keep_prob"] * (keep_prob != 1.0) + ["softmax_layout"] * bool(softmax_layout)
    given += ["sparse_mode"] * (sparse_mode not in _CHECKED_MODES)
    if given:
        raise NotImplementedError(f"ascend_sim has no npu_fusion_attention with this {', '.join(given)}.")
    require(input_layout in _LAYOUTS, _API, f"input_layout {input_layout!r} is none of {_LAYOUTS}.")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_dtype(_API, name, tensor)
        require(tensor.dtype == query.dtype, _API, f"{name} of {tensor.dtype} differs from query of {query.dtype}.")
        dims = {"BSH": 3, "SBH": 3, "TND": 3}.get(input_layout, 4)
        require(tensor.dim() == dims, _API, f"{name} should be {dims}-D in {input_layout}, but it is {tensor.dim()}-D.")
        require(tensor.numel() > 0, _API, f"{name} shape {tuple(tensor.shape)} is empty.")
    _check_heads(query, key, value, head_num, input_layout)
    if input_layout == "TND":
        _check_ends(query, key, actual_seq_qlen, actual_seq_kvlen)
    if atten_mask is not None:
        require_dtype(_API, "attenMask", atten_mask, (torch.bool, torch.uint8))
        if sparse_mode in _COMPRESSED_MODES:
            square = tuple(atten_mask.shape) == (_COMPRESSED, _COMPRESSED)
            require(square, _API, f"sparse_mode {sparse_mode}: attenMask should be 2048 x 2048.")
        else:
            require(atten_mask.dim() in (2, 4), _API, "attenMask should be BNSS, B1SS, 11SS or SS.")
            require(input_layout != "TND" or atten_mask.dim() == 2, _API, "attenMask should be SS in TND.")


def _check_heads(query: Tensor, key: Tensor, value: Tensor, head_num: int, layout: str) -> None:
    require(1 <= head_num <= 256, _API, f"head_num should be in [1,256], but it is {head_num}.")
    if layout in ("BSH", "SBH"):
        require(query.shape[-1] % head_num == 0, _API, f"H {query.shape[-1]} is no multiple of head_num {head_num}.")
        width = query.shape[-1] // head_num
        require(key.shape[-1] % width == 0, _API, f"H of the key {key.shape[-1]} is no multiple of D {width}.")
        key_heads = key.shape[-1] // width
        value_width = value.shape[-1] // key_heads
    else:
        axis = 1 if layout == "BNSD" else -2
        require(query.shape[axis] == head_num, _API, f"query has {query.shape[axis]} heads, head_num is {head_num}.")
        require(key.shape[axis] == value.shape[axis], _API, "key and value differ in their number of heads.")
        key_heads, width, value_width = key.shape[axis], query.shape[-1], value.shape[-1]
        require(key.shape[-1] == width, _API, f"D of query {width} and of key {key.shape[-1]} differ.")
    require(head_num % key_heads == 0, _API, f"{head_num} query heads are no multiple of {key_heads} key heads.")
    require(1 <= value_width <= width <= 768, _API, f"D of key {width} and value {value_width}: 768 >= Dk >= Dv >= 1.")


def _check_ends(query: Tensor, key: Tensor, ends_q: Sequence[int] | None, ends_k: Sequence[int] | None) -> None:
    for name, tensor, ends in (("q", query, ends_q), ("kv", key, ends_k)):
        require(bool(ends), _API, f"TND: actual_seq_{name}len should be given.")
        kept = [end for end in ends or () if end]
        is_running_sum = bool(kept) and kept == sorted(kept) and kept[-1] <= len(tensor)
        require(is_running_sum, _API, f"TND: actual_seq_{name}len {list(ends or ())} is no running sum.")
        require(len(ends or ()) <= 1024, _API, f"TND: actual_seq_{name}len has more than 1024 entries.")
    require(len(ends_q or ()) == len(ends_k or ()), _API, "TND: actual_seq_qlen and actual_seq_kvlen differ in length.")


KERNELS = (
    Kernel("npu_fusion_attention", fusion_attention, _check),
    Kernel("npu_fusion_attention_grad", fusion_attention_grad),
)
