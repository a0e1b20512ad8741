"""What a wheel does not say of its operators: which stall the host, which refuse a dtype, and what to do instead.

Kept by hand, each entry with its source. `DOCS` is Ascend's list of torch's functions, its dtypes and remarks; where
that list is plainly behind the kernels (it gives matmul no bfloat16) nothing is taken from it. What depends on values
or reads them is found by `testing/operators.py` and only explained here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["falls back to the CPU", "dynamic shape", "host sync", "dtype limit"]
FALLBACK: Kind = "falls back to the CPU"
DYNAMIC: Kind = "dynamic shape"
SYNC: Kind = "host sync"
DTYPE: Kind = "dtype limit"
KINDS: tuple[Kind, ...] = (FALLBACK, DYNAMIC, SYNC, DTYPE)

DOCS = "Ascend/pytorch docs/zh/native_apis/pytorch_2-6-0/torch.md"
_WHEEL = "npu_native_functions_by_codegen.yaml of the torch_npu 2.13.0 wheel"


@dataclass(frozen=True)
class Limit:
    """One thing that a card does not do as it should.

    why: in a clause. instead: what to write, in a clause. source: where it is said.
    """

    kind: Kind
    why: str
    instead: str
    source: str


def _no_bfloat16(instead: str) -> tuple[frozenset[torch.dtype], Limit]:
    return frozenset({torch.bfloat16}), Limit(DTYPE, "bfloat16 is not supported", instead, DOCS)


# Name without overload -> refused dtypes of the first tensor. argsort and msort arrive as sort.
_REFUSED: Mapping[str, tuple[frozenset[torch.dtype], Limit]] = {
    **dict.fromkeys(
        ("aten::sort", "aten::argsort", "aten::kthvalue"), _no_bfloat16("sort x.float(), or take topk, which has it")
    ),
    **dict.fromkeys(
        ("aten::cumsum", "aten::cumsum_", "aten::cumprod", "aten::cumprod_", "aten::cummax", "aten::cummin"),
        _no_bfloat16("accumulate in float32: x.float()"),
    ),
    **dict.fromkeys(
        ("aten::index_add", "aten::index_add_"),
        (
            frozenset({torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32}),
            Limit(DTYPE, "only float16, float32, int64 and bool are supported", "add in float32", DOCS),
        ),
    ),
}
_SCATTER_REDUCE = Limit(
    FALLBACK, "not supported; computed by way of the CPU", "use scatter_add, or topk and gather", DOCS
)
_GROUPED_MM = Limit(
    SYNC,
    "no Ascend kernel; a loop over the experts that reads their offsets on the host",
    "train the converted model (npu_grouped_matmul)",
    f"{_WHEEL}; torch's composite kernel",
)
_HISTC = Limit(SYNC, "without min and max the range is read on the host", "give min and max", "torch_npu's histc")
ONE_HOT = Limit(
    SYNC, "without num_classes the largest value is read on the host", "give num_classes", "torch's one_hot"
)
_TOPK = Limit(DTYPE, "sorted=False is not supported", "leave sorted=True", DOCS)
REPEAT = Limit(
    DTYPE, "an output of 2^22 elements or more is not supported", "expand and reshape, or index_select", DOCS
)
REPEAT_ELEMENTS = 2**22
FLOAT64 = Limit(
    DTYPE, "float64 silently becomes float32 on the card", "ask for torch.float32", "torch_npu's Tensor.double"
)
COLLECTIVE_FLOAT64 = Limit(
    DTYPE, "HCCL has no float64", "communicate float32", "torch_npu's ProcessGroupHCCL, its table of dtypes"
)
COMPLEX = Limit(
    DTYPE,
    "few kernels take complex numbers (index and gather refuse them), and slowly",
    "compute with cosines and sines as real numbers, as the converted model does",
    f"{DOCS}: polar, view_as_complex, gather, index_select; vllm-project/vllm-omni issue 4911",
)

# What to do instead for what depends on values, by name without overload.
_DYNAMIC_INSTEAD = {
    "aten::nonzero": "compute all rows and select by torch.where, or sort into groups of fixed size",
    "aten::masked_select": "torch.where(mask, x, 0) keeps the shape",
    "aten::bincount": "zeros(n).scatter_add_ with the known number of bins",
    "aten::repeat_interleave": "pass output_size=",
    "aten::index": "torch.where instead of a boolean index, or index_select",
    "aten::index_put_": "masked_fill_ or torch.where instead of a boolean index",
}
_UNIQUE = "count into a tensor of known size by scatter_add_"
_SYNC_INSTEAD = {
    "aten::_local_scalar_dense": "keep the number as a tensor; log it every few steps only",
    "aten::equal": "keep the comparison as a tensor: (a == b).all()",
    "aten::allclose": "keep the comparison as a tensor: torch.isclose",
    "aten::_linalg_check_errors": "use the _ex variant, whose info stays a tensor",
}
FALLBACK_INSTEAD = {
    "aten::mode": "count with one_hot and sum, then argmax",
    "aten::histogram": "histc with min and max",
    "aten::logcumsumexp": "cumsum of exp after subtracting the maximum, in float32",
    "aten::_logcumsumexp": "cumsum of exp after subtracting the maximum, in float32",
    "aten::index_reduce": "scatter_add, or topk and gather",
    "aten::nonzero_static": "topk of the mask, which has a fixed size too",
    "aten::_assert_async": "leave the check to the CPU's tests",
    "aten::_fused_adamw_": "give the learning rate as a float",
}


def stall(kind: Kind, operator: str) -> Limit:
    """Explain a sighting of `testing.operators`: a read on the host or a shape that depends on values."""
    name = operator.removesuffix("_") if operator.startswith("aten::_index_put_impl") else operator
    if kind == DYNAMIC:
        instead = _DYNAMIC_INSTEAD.get(name) or (_UNIQUE if "unique" in name else _DYNAMIC_INSTEAD["aten::index"])
        return Limit(DYNAMIC, "the shape of the result depends on values; the host waits for it", instead, DOCS)
    instead = _SYNC_INSTEAD.get(name, "keep the values on the card; log them every few steps only")
    return Limit(SYNC, "the host waits until the card has finished", instead, "torch's device-to-host copies block")


def fallback(operator: str, how: str) -> Limit:
    """Explain an operator without a kernel; how: its class in the operator table, "fallback" or "neither"."""
    name = operator.partition(".")[0]
    why = "no Ascend kernel" if how == "fallback" else "no Ascend kernel and nothing to fall back to: it raises"
    instead = FALLBACK_INSTEAD.get(name) or FALLBACK_INSTEAD.get(name.removesuffix("_"))
    return Limit(FALLBACK, why, instead or "build it from other operators, or compute it in the data loader", _WHEEL)


def limits_of(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Limit]:
    """What is wrong with one call by what is kept here; name: without overload."""
    first = next(tensors_in(args), None)
    refused, limit = _REFUSED.get(name, (frozenset(), None))
    if limit is not None and first is not None and first.dtype in refused:
        yield limit
    if name in ("aten::scatter_reduce", "aten::scatter_reduce_"):
        yield _SCATTER_REDUCE
    elif name == "aten::_grouped_mm":
        yield _GROUPED_MM
    elif name == "aten::histc":
        low, high = (args[place] if len(args) > place else 0 for place in (2, 3))
        if low == high:
            yield _HISTC
    elif name == "aten::topk" and not (args[4] if len(args) > 4 else kwargs.get("sorted", True)):
        yield _TOPK
    elif name.startswith(("c10d::", "_c10d_functional::")):
        if any(tensor.dtype == torch.float64 for tensor in tensors_in((*args, *kwargs.values()))):
            yield COLLECTIVE_FLOAT64


def limits_of_result(
    name: str, inputs: Iterable[Tensor], results: Iterable[Tensor], *, is_view: bool = False
) -> Iterator[Limit]:
    """What is wrong with the dtypes that a call took and gave; is_view: it runs no kernel."""
    inputs, results = list(inputs), list(results)
    is_quiet = is_view and name not in ("aten::view_as_complex", "aten::view_as_real")
    if not is_quiet and any(tensor.is_complex() for tensor in (*inputs, *results)):
        yield COMPLEX
    # Where it arises; what is computed from it further on has the same cause.
    if any(tensor.dtype == torch.float64 for tensor in results) and not any(
        tensor.dtype == torch.float64 for tensor in inputs
    ):
        yield FLOAT64


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Tensors in arguments or results, lists and tuples of them included."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)


# What torch runs on a CPU only -> what it is part of, which torch_npu has a kernel for.
CPU_ONLY: Mapping[str, str] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "aten::scaled_dot_product_attention",
    "aten::mkldnn_rnn_layer": "aten::lstm.input",
    "aten::mkldnn_rnn_layer_backward": "aten::lstm.input",
}
# Namespaces whose operators are no kernels: communication, which HCCL does, and marks for profilers.
NOT_KERNELS = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "fsdp", "profiler", "prim", "prims", "npu")
# Functions that torch_npu has one kernel for, and that look at values on a CPU only.
ONE_KERNEL = frozenset({torch.nn.functional.one_hot, torch.nn.functional.scaled_dot_product_attention})
