"""npu_grouped_matmul: one matrix product per group of rows (group_type 0) or per group of the summed axis (2).

group_type 0 is the split of M: x [R, K], rows sorted by group, weight [E, K, N] or E matrices; y [R, N].
group_type 2 is the split of K, a weight's gradient: x [M, R] as a transposed view, weight [R, N]; y [E, M, N].
Rows past the last group are left as they were in memory, and so is the product of a group without rows.
Bias and the quantised forms are left out. The operator has no autograd in torch_npu.
Source: torch_npu/_op_plugin_docs.py and the wheel's meta kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ascend_sim.operators.kernel import FLOATS, Kernel, is_transposed, refuse, require, uninitialised, wide

_API = "aclnnGroupedMatmulV4"
_INNER_LIMIT = 65536
_MAX_GROUPS = 1024
_MAX_TENSORS = 128


def _spans(group_list: Tensor | Sequence[int], group_list_type: int) -> Iterator[tuple[int, int]]:
    """Yield (first, one after the last) of each group."""
    numbers = [int(number) for number in group_list]
    start = 0
    for number in numbers:
        stop = number if group_list_type == 0 else start + number
        yield start, stop
        start = stop


def _product(a: Tensor, b: Tensor) -> Tensor:
    dtype = wide(a.dtype)
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    group_list: Tensor | Sequence[int] | None = None,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
    **_: Any,
) -> list[Tensor]:
    """Return the products, in the dtype of x: several for split_item 0 and 1, one for 2 and 3."""
    if group_type == -1 or group_list is None:
        products = [_product(a, b) for a, b in zip(x, weight, strict=True)]
        return products if split_item in (0, 1) else [torch.cat(products)]
    spans = list(_spans(group_list, group_list_type or 0))
    rows = torch.cat(tuple(x)) if len(x) > 1 else x[0]
    if group_type == 2:
        y = uninitialised((len(spans), rows.shape[0], weight[0].shape[-1]), rows)
        for group, (start, stop) in enumerate(spans):
            if stop > start:
                y[group] = _product(rows[:, start:stop], weight[0][start:stop])
        return [y]
    y = uninitialised((rows.shape[0], weight[0].shape[-1]), rows)
    for group, (start, stop) in enumerate(spans):
        y[start:stop] = _product(rows[start:stop], weight[group] if len(weight) > 1 else weight[0][group])
    return [y] if split_item in (2, 3) else [y[start:stop] for start, stop in spans]


def _check(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Any = None,
    group_list: Tensor | Sequence[int] | None = None,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
    **others: Any,
) -> None:
    if bias is not None or any(value for value in others.values()):
        given = sorted(name for name, value in {"bias": bias, **others}.items() if value)
        raise NotImplementedError(f"ascend_sim has no npu_grouped_matmul with {', '.join(given)}.")
    require(0 < len(x) <= _MAX_TENSORS and 0 < len(weight) <= _MAX_TENSORS, _API, "x and weight take 1 to 128 tensors.")
    dtype = x[0].dtype
    if dtype not in FLOATS or any(tensor.dtype != dtype for tensor in (*x, *weight)):
        refuse(
            _API, f"x and weight of {sorted({str(t.dtype) for t in (*x, *weight)})}: one of float16, bfloat16, float32."
        )
    known = group_type in (-1, 0, 2) or (group_type is None and not isinstance(group_list, Tensor))
    require(known, _API, f"group_type only supports -1, 0 and 2, but got {group_type}.")
    if isinstance(group_list, Tensor):
        _check_group_list(group_list, group_list_type or 0, group_type)
    for name, tensors in (("x", x), ("weight", weight)):
        for tensor in tensors:
            inner = tensor.shape[-2 if is_transposed(tensor) else -1]
            require(
                inner < _INNER_LIMIT, _API, f"The inner axis of {name} is {inner}, which is not below {_INNER_LIMIT}."
            )
    if group_type == 0:
        _check_rows(x, weight, split_item)
    if group_type == 2:
        single = len(x) == len(weight) == 1 and x[0].dim() == weight[0].dim() == 2 and split_item in (2, 3)
        require(single, _API, "group_type 2 takes one 2-D x, one 2-D weight and split_item 2 or 3.")
        require(is_transposed(x[0]), _API, "group_type 2: x should be transposed.")
        require(not is_transposed(weight[0]), _API, "group_type 2: weight should not be transposed.")
        require(x[0].shape[1] == weight[0].shape[0], _API, "group_type 2: the K axes of x and weight differ.")


def _check_rows(x: Sequence[Tensor], weight: Sequence[Tensor], split_item: int) -> None:
    require(split_item in (2, 3), _API, f"group_type 0 takes split_item 2 or 3, but got {split_item}.")
    for tensor in x:
        require(tensor.dim() == 2, _API, f"group_type 0: x should be 2-D, but it is {tensor.dim()}-D.")
        require(not is_transposed(tensor), _API, "group_type 0: x should not be transposed.")
    for tensor in weight:
        dims = 3 if len(weight) == 1 else 2
        require(tensor.dim() == dims, _API, f"group_type 0: weight should be {dims}-D, but it is {tensor.dim()}-D.")
        depth = tensor.shape[-2]
        require(depth == x[0].shape[1], _API, f"group_type 0: K is {x[0].shape[1]} in x and {depth} in weight.")


def _check_group_list(group_list: Tensor, group_list_type: int, group_type: int | None) -> None:
    require(
        group_list.dtype == torch.int64,
        _API,
        f"Tensor groupList not implemented for {group_list.dtype}, should be in dtype support list [DT_INT64,].",
    )
    require(group_list.dim() == 1, _API, "groupList should be 1-D.")
    require(group_list_type in (0, 1), _API, f"group_list_type should be 0 or 1, but got {group_list_type}.")
    num_groups = group_list.shape[0]
    require(num_groups <= _MAX_GROUPS, _API, f"groupList has {num_groups} groups; at most {_MAX_GROUPS} are supported.")
    require(
        num_groups > 1 or group_list_type == 0,
        _API,
        "groupList with group_list_type 1 should have more than one element.",
    )


KERNELS = (
    Kernel("npu_grouped_matmul", grouped_matmul, _check),
    Kernel("npu_grouped_matmul.List", grouped_matmul, _check),
)
