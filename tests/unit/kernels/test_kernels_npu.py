"""The kernels of npu without an npu: how they call torch_npu's operators, and when they do not.

Catches a call that the operators would understand otherwise (order of matrices, lists of counts, masks turned
round), what they leave uninitialised getting into a result, torch_npu imported by a run that has none, and a
fallback that is silent or never stops talking. The operators here are the simulated card's, on CPU tensors;
tests/sim runs the same kernels through the real torch_npu.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ascend_sim.operators import KERNELS
from lightning_npu_tp.kernels import npu, npu_layers, npu_limits, plain, select
from lightning_npu_tp.kernels.grouped import RowGroups, grouped_matmul
from lightning_npu_tp.kernels.rows import MOVES, sort_picks
from lightning_npu_tp.tools.testing.reference import assert_close_relative

FLOAT32 = 1e-5


@pytest.fixture(autouse=True)
def say_everything_anew():
    npu_limits.forget()
    yield
    npu_limits.forget()


@pytest.fixture
def operators(monkeypatch):
    """The operators as functions on CPU tensors, which check their arguments; returns the names that ran."""
    ran: list[str] = []

    def operator(kernel):
        def run(*args, **kwargs):
            ran.append(kernel.name)
            if kernel.check is not None:
                kernel.check(*args, **kwargs)
            return kernel.compute(*args, **kwargs)

        return run

    table = SimpleNamespace(**{kernel.name: operator(kernel) for kernel in KERNELS})
    monkeypatch.setattr(torch.ops, "npu", table, raising=False)

    def anywhere(*tensors: Tensor):
        return [(t.numel() > 0, "a tensor without elements is not supported") for t in tensors]

    for module in (npu, npu_layers):
        monkeypatch.setattr(module, "common_limits", anywhere)
    return ran


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compare(fused, reference, *inputs: Tensor) -> None:
    """Results and gradients of all inputs."""
    results = []
    for function in (fused, reference):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, draw(*y.shape, seed=9))))
    for number, (got, wanted) in enumerate(zip(*results, strict=True)):
        assert_close_relative(got, wanted, FLOAT32, f"result {number}")


def test_choosing_the_kernels_of_npu_imports_no_torch_npu():
    code = (
        "import sys; sys.modules['torch_npu'] = None\n"
        "from lightning_npu_tp.kernels import select\n"
        "chosen = select('npu')\n"
        "assert chosen.rms_norm.__module__.endswith('npu_layers') and chosen.permute.__module__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_operation_but_the_fused_experts_and_the_assertion_has_a_kernel_for_npu_and_a_reference():
    for operation in select("npu").names:
        if operation not in ("expert_mlp", "vocabulary"):
            assert select("npu").names[operation] == "npu"
            assert select("npu", {operation: "reference"}).names[operation] == "reference"
    kept = select("npu", {"rotary": None}).rotate
    assert kept is npu_layers.rotate, "null in a config is the device's own"


def test_switching_off_a_part_of_the_experts_on_the_cpu_leaves_the_function_that_would_bypass_it():
    for operation in ("grouped_matmul", "permute", "swiglu"):
        assert select("cpu", {operation: "reference"}).expert_mlp is None
    assert select("cpu", {"attention": "reference"}).expert_mlp is not None


@pytest.mark.parametrize("counts", [[2, 0, 3], [5], [0, 5]], ids=str)
def test_grouped_products_and_their_gradients_skip_what_nobody_wrote(operators, counts):
    groups = RowGroups.of(torch.tensor(counts))
    reference = select("cpu", {"grouped_matmul": "reference"}).grouped

    def product(primitives):
        # The gradient of what lies past the last group is zero here, and garbage in the model.
        return lambda x, weight: grouped_matmul(x, weight, groups, primitives)[:5]

    compare(product(npu.PRIMITIVES), product(reference), draw(5, 4), draw(len(counts), 6, 4, seed=1))
    assert operators == ["npu_grouped_matmul"] * 3
    dw = npu.PRIMITIVES.grads_by_rows(draw(8, 6), draw(8, 4), groups)
    assert dw.isfinite().all() and not dw[groups.counts_E == 0].any()


class GarbagePast(torch.autograd.Function):
    """Rows past the last one as a grouped matmul leaves them, not a number, in the gradient too."""

    @staticmethod
    def forward(ctx, x, last):
        ctx.last = last
        return GarbagePast.spoil(x, last)

    @staticmethod
    def backward(ctx, grad):
        return GarbagePast.spoil(grad, ctx.last), None

    @staticmethod
    def spoil(x, last):
        return torch.cat((x[:last], torch.full_like(x[last:], torch.nan)))


@pytest.mark.parametrize("first, num_local", [(0, 6), (2, 3)])
def test_rows_move_there_and_back_as_in_the_reference_while_other_ranks_rows_are_garbage(operators, first, num_local):
    ids = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(t))[:3] for t in range(5)])
    x, weights = draw(5, 4), draw(5, 3, seed=1).abs()

    def there_and_back(moves):
        def run(x: Tensor, weights: Tensor) -> Tensor:
            rows = sort_picks(ids, first=first, num_local=num_local)
            moved = moves.tokens_to_rows(x, rows)
            moved = GarbagePast.apply(moved.square(), int(rows.groups.ends_E[-1]))
            return moves.rows_to_tokens(moved, weights, rows)

        return run

    compare(there_and_back(npu.MOVES), there_and_back(MOVES), x, weights)
    assert operators == ["npu_moe_token_permute", "npu_moe_token_unpermute"]


def test_the_operator_sorts_and_nothing_sorts_again(operators, monkeypatch):
    rows = sort_picks(torch.tensor([[1, 0], [2, 1]]), first=0, num_local=3)
    wanted = sort_picks(torch.tensor([[1, 0], [2, 1]]), first=0, num_local=3).sorted_N
    moved = npu.tokens_to_rows(draw(2, 4), rows)
    monkeypatch.setattr(torch, "argsort", None)
    npu.rows_to_tokens(moved, torch.ones(2, 2), rows)
    assert torch.equal(rows.sorted_N, wanted.int())


def test_weights_of_the_picks_have_the_dtype_of_the_rows_or_gradients_would_be_lost(operators, monkeypatch):
    seen = []
    unpermute = torch.ops.npu.npu_moe_token_unpermute
    monkeypatch.setattr(
        torch.ops.npu,
        "npu_moe_token_unpermute",
        lambda rows, index, probs: seen.append((rows.dtype, index.dtype, probs.dtype)) or unpermute(rows, index, probs),
    )
    rows = sort_picks(torch.tensor([[1, 0], [2, 1]]), first=0, num_local=3)
    out = npu.rows_to_tokens(draw(4, 4).bfloat16(), torch.ones(2, 2), rows)
    assert seen == [(torch.bfloat16, torch.int32, torch.bfloat16)]
    assert out.dtype == torch.float32


def test_norm_and_activation_are_called_as_the_reference_is(operators):
    compare(
        lambda x, w: npu_layers.rms_norm(x, w, 1e-3), lambda x, w: plain.rms_norm(x, w, 1e-3), draw(2, 3, 8), draw(8)
    )
    compare(npu_layers.swiglu, plain.swiglu, draw(3, 8))
    assert operators == ["npu_rms_norm", "npu_swiglu"]


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("tables", [1, 3])
def test_rotation_joins_the_sequences_into_one(operators, interleaved, tables):
    angle = draw(tables, 5, 2, seed=1)

    def rotated(kernel):
        return lambda x: kernel(x, angle.cos(), angle.sin(), interleaved=interleaved)

    compare(rotated(npu_layers.rotate), rotated(plain.rotate), draw(3, 5, 2, 4))
    assert operators == ["npu_rotary_mul"]


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_hides_what_the_mask_does_not_show(operators, key_heads, masked):
    mask = None
    if masked:
        mask = torch.ones(6, 6, dtype=torch.bool).tril() & ~torch.eye(6, dtype=torch.bool).roll(-2, 1)
        mask = (mask | torch.eye(6, dtype=torch.bool)).expand(2, 1, -1, -1)

    def attention(kernel):
        return lambda q, k, v: kernel(q, k, v, mask=mask, scale=0.3, dropout=0.0)

    inputs = draw(2, 4, 6, 8), draw(2, key_heads, 6, 8, seed=1), draw(2, key_heads, 6, 5, seed=2)
    compare(attention(npu_layers.attend), attention(plain.attend), *inputs)
    assert operators == ["npu_fusion_attention"]


def test_one_query_over_a_cache_sees_every_key(operators):
    q, k = draw(1, 2, 1, 4), draw(1, 2, 7, 4, seed=1)
    settings = {"mask": None, "scale": 0.5, "dropout": 0.0}
    assert_close_relative(npu_layers.attend(q, k, k, **settings), plain.attend(q, k, k, **settings), FLOAT32, "output")


def test_a_reason_for_the_reference_is_said_once_and_another_reason_again(caplog):
    x, weight = torch.ones(2, 4), torch.ones(4)
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        assert torch.equal(npu_layers.rms_norm(x, weight, 0.0), plain.rms_norm(x, weight, 0.0))
    npu_layers.swiglu(x)
    npu_limits.fits("swiglu", [(False, "another reason")])
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert "kernels.rms_norm: a tensor lies on cpu" in lines[0] and "kernels.rms_norm=reference" in lines[0]
    assert "kernels.swiglu" in lines[1] and "another reason" in lines[2]
