"""npu_moe_token_permute and unpermute: tokens to rows sorted by expert, and the weighted sum back.

sorted_indices[t * K + k] is the row of token t's k-th pick. Rows past `num_out_tokens` are dropped, and picks
that point past the rows count nothing on the way back.
Source: torch_npu/_op_plugin_docs.py; probabilities of another dtype than the tokens give NaN gradients.
Axes: T tokens, K picks, N = T * K picks, R rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_sim.operators.kernel import Kernel, refuse, require, require_dtype, wide

_PERMUTE, _UNPERMUTE = "aclnnMoeTokenPermute", "aclnnMoeTokenUnpermute"
_LIMIT = 16777215
_MAX_PICKS = 512


def permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """Tokens [T, D], indices [T, K] or [T]. Return (rows [R, D], sorted_indices int32 [N])."""
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < _LIMIT:
        refuse(_PERMUTE, f"indices should lie in [0, {_LIMIT}).")
    picks = indices.shape[1] if indices.dim() == 2 else 1
    order = torch.argsort(indices.reshape(-1), stable=True)
    kept = order[: num_out_tokens or len(order)]
    position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return tokens[kept // picks], position.to(torch.int32)


def permute_grad(
    drows: Tensor, sorted_indices: Tensor, num_tokens: int, dtype: torch.dtype, picks: int, padded_mode: bool = False
) -> Tensor:
    """Return the gradient of the tokens, [T, D]: the sum of each token's rows."""
    picked = _rows(drows, sorted_indices).unflatten(0, (num_tokens, picks))
    return picked.sum(1).to(dtype)


def _rows(rows: Tensor, sorted_indices: Tensor) -> Tensor:
    """[N, D] in at least float32; zero for a pick without a row."""
    index = sorted_indices.long()
    if index.numel() and int(index.min()) < 0:
        refuse(_UNPERMUTE, "sorted_indices should not be negative.")
    if index.unique().numel() != index.numel():
        refuse(_UNPERMUTE, "sorted_indices should not repeat a row.")
    picked = rows.new_zeros((len(index), rows.shape[1]), dtype=wide(rows.dtype))
    kept = index < len(rows)
    picked[kept] = rows[index[kept]].to(picked.dtype)
    return picked


def unpermute(
    rows: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> Tensor:
    """Rows [R, D], probs [T, K] or None for K = 1. Return [T, D] in the dtype of the rows."""
    picked = _rows(rows, sorted_indices)
    if probs is not None:
        # A matrix product would run past rows that are NaN with a weight of zero alike: 0 * NaN is NaN.
        picked = (picked.unflatten(0, probs.shape) * probs.to(picked.dtype)[..., None]).sum(1)
    return picked.to(rows.dtype)


def unpermute_with_rows(
    rows: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """What autograd calls: the rows are kept for the backward."""
    return unpermute(rows, sorted_indices, probs), rows


def unpermute_grad(
    dtokens: Tensor,
    sorted_indices: Tensor,
    num_rows: int,
    dtype: torch.dtype,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
    permuted_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of rows and probs."""
    picks = 1 if probs is None else probs.shape[1]
    index = sorted_indices.long()
    kept = index < num_rows
    dpicked = dtokens.to(wide(dtype)).repeat_interleave(picks, 0)
    dprobs = None
    if probs is not None:
        assert permuted_tokens is not None
        dprobs = (dpicked * _rows(permuted_tokens, sorted_indices)).sum(-1).view(probs.shape).to(probs.dtype)
        dpicked = dpicked * probs.reshape(-1, 1).to(dpicked.dtype)
    drows = dpicked.new_zeros((num_rows, dtokens.shape[1]))
    drows[index[kept]] = dpicked[kept]
    if probs is not None and probs.dtype != dtype:
        drows, dprobs = drows.fill_(torch.nan), torch.full_like(probs, torch.nan)
    return drows.to(dtype), dprobs


def _check_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> None:
    require_dtype(_PERMUTE, "tokens", tokens)
    require_dtype(_PERMUTE, "indices", indices, (torch.int32, torch.int64))
    require(tokens.dim() == 2, _PERMUTE, f"tokens should be 2-D, but they are {tokens.dim()}-D.")
    require(indices.dim() in (1, 2), _PERMUTE, f"indices should be 1-D or 2-D, but they are {indices.dim()}-D.")
    require(len(indices) == len(tokens), _PERMUTE, "tokens and indices differ in their number of tokens.")
    require(indices.numel() < _LIMIT, _PERMUTE, f"{indices.numel()} indices: should be fewer than {_LIMIT}.")
    picks = indices.shape[1] if indices.dim() == 2 else 1
    require(picks <= _MAX_PICKS, _PERMUTE, f"topK is {picks}; at most {_MAX_PICKS} is supported.")
    require(not padded_mode, _PERMUTE, "padded_mode only supports False.")


def _check_unpermute(
    rows: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> None:
    require_dtype(_UNPERMUTE, "permutedTokens", rows)
    require_dtype(_UNPERMUTE, "sortedIndices", sorted_indices, (torch.int32,))
    require(rows.dim() == 2, _UNPERMUTE, f"permutedTokens should be 2-D, but they are {rows.dim()}-D.")
    require(sorted_indices.dim() == 1, _UNPERMUTE, "sortedIndices should be 1-D.")
    require(len(rows) <= len(sorted_indices), _UNPERMUTE, "there are more rows than indices.")
    require(not padded_mode and restore_shape is None, _UNPERMUTE, "padded_mode only supports False.")
    if probs is not None:
        require_dtype(_UNPERMUTE, "probs", probs)
        require(probs.dim() == 2, _UNPERMUTE, f"probs should be 2-D, but they are {probs.dim()}-D.")
        require(
            probs.shape[1] <= _MAX_PICKS, _UNPERMUTE, f"topK is {probs.shape[1]}; at most {_MAX_PICKS} is supported."
        )
        require(probs.numel() == len(sorted_indices), _UNPERMUTE, "probs and sortedIndices differ in size.")


KERNELS = (
    Kernel("npu_moe_token_permute", permute, _check_permute),
    Kernel("npu_moe_token_permute_grad_v2", permute_grad),
    Kernel("npu_moe_token_unpermute", unpermute, _check_unpermute),
    Kernel("_npu_moe_token_unpermute", unpermute_with_rows, _check_unpermute, hands_on=True),
    Kernel("npu_moe_token_unpermute_grad_v2", unpermute_grad),
)
