"""torch's own table of operators on the simulated card, against the same calls on the CPU, forward and backward.

Catches a boxed kernel that mistakes an argument: a list, an optional, an out=, a view, a resize, a generator. Of the
677 operators with float32 samples at least 660 must agree; those that do not are listed here with the reason.
"""

from __future__ import annotations

import itertools
import sys
import types
import unittest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

SAMPLES = 2
# Values are not compared where they are drawn, left uninitialised, or unique only up to a sign or a rotation.
FREE = (
    "rand bernoulli dropout normal multinomial uniform exponential cauchy geometric log_normal empty svd eig qr lowrank"
).split()
# Each product or sum of a sample is small; the CPU kernel is the same one, in another memory layout at most.
CLOSE = 1e-4
_SPARSE = "torch_npu registers no kernel for compressed sparse rows"
_DRAWN = "draws random numbers, which on the card are others"
_NO_DOUBLE = "torch_npu gives float32 where float64 is asked for"
KNOWN = {
    "sparse.sampled_addmm": _SPARSE,
    "sparse.mm.reduce": _SPARSE,
    "nn.functional.fractional_max_pool3d": _DRAWN,
    "nn.functional.rrelu": _DRAWN,
    "nn.functional.multi_head_attention_forward": _DRAWN,
    "to": "torch_npu refuses channels_last",
    "float_power": _NO_DOUBLE,
    "double": _NO_DOUBLE,
    "tensor_split": "torch itself wants the indices on the CPU",
}


def operators() -> list[Any]:
    # Only its test cases need that package, and only for how they print.
    sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))  # type: ignore[arg-type]
    from torch.testing._internal.common_methods_invocations import op_db

    return [op for op in op_db if torch.float32 in op.supported_dtypes("cpu")]


def moved(device: str) -> Callable[[Any], Any]:
    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().clone().to(device).requires_grad_(value.requires_grad)
        return torch.device(device) if isinstance(value, torch.device) else value

    return lambda tree: tree_map(move, tree)


def call(op: Any, sample: Any, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results and gradients of one sample."""
    move = moved(device)
    kwargs = move(dict(sample.kwargs))
    if "device" in kwargs:
        kwargs["device"] = device
    torch.manual_seed(0)
    inputs = move((sample.input, sample.args))
    leaves = [t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.requires_grad]
    results = [t for t in tree_leaves(op(inputs[0], *inputs[1], **kwargs)) if isinstance(t, torch.Tensor)]
    grads: list[torch.Tensor] = []
    loss = sum(t.abs().sum() for t in results if t.requires_grad)
    if op.supports_autograd and leaves and isinstance(loss, torch.Tensor):
        grads = [g for g in torch.autograd.grad(loss, leaves, allow_unused=True) if g is not None]
    return results, grads


def difference(op: Any) -> str | None:
    """What goes wrong with an operator on the card; None if nothing does."""
    for sample in itertools.islice(op.sample_inputs("cpu", torch.float32, requires_grad=op.supports_autograd), SAMPLES):
        try:
            wanted = call(op, sample, "cpu")
        except Exception:
            # A sample that the CPU refuses says nothing about the card.
            continue
        try:
            got = call(op, sample, "npu")
            assert [len(part) for part in got] == [len(part) for part in wanted]
            for a, b in zip(itertools.chain(*got), itertools.chain(*wanted), strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                if b.layout == torch.strided and not any(word in op.name for word in FREE):
                    a, b = a.detach().cpu().resolve_conj(), b.detach().resolve_conj()
                    torch.testing.assert_close(a, b, rtol=CLOSE, atol=CLOSE, equal_nan=True)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def test_the_operators_of_torch_compute_on_the_card_what_they_compute_on_the_cpu() -> None:
    table = operators()
    failed = {}
    for op in table:
        name = f"{op.name}.{op.variant_test_name}".rstrip(".")
        if problem := difference(op):
            failed[name] = problem
    unexpected = {name: problem for name, problem in failed.items() if name not in KNOWN}
    assert not unexpected, "\n".join(f"{name}: {problem}" for name, problem in unexpected.items())
    assert not KNOWN.keys() - failed.keys(), "listed, and works"
    assert len(table) == 677 and len(table) - len(failed) >= 660
