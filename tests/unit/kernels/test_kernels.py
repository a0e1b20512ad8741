"""Catches a grouped matmul that multiplies a row by the wrong expert, reads rows that are nobody's, leaves
an expert without rows with garbage or no gradient, or quietly computes in another dtype; a row that
finds its way to the wrong token; and kernels chosen by anything but device and config.
"""

from __future__ import annotations

import gc
import math

import pytest
import torch

from lightning_npu_tp.errors import ConfigError, VocabularyError
from lightning_npu_tp.kernels import Kernels, cpu_experts, pages, select
from lightning_npu_tp.kernels.cpu_experts import expert_mlp
from lightning_npu_tp.kernels.grouped import GroupedPrimitives, RowGroups, grouped_matmul
from lightning_npu_tp.kernels.rows import rows_to_tokens, sort_picks, tokens_to_rows
from lightning_npu_tp.tools.testing.reference import assert_close_relative

IMPLEMENTATIONS = ("reference", "torch_native", "cpu")
# Rounding of one product's result; the sums inside are longer in float32 than in bfloat16's accumulators.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 6e-3}
COUNTS = [3, 0, 5, 0, 1]
NUM_ROWS, WIDTH_IN, WIDTH_OUT = 12, 8, 16


def primitives_of(name: str) -> GroupedPrimitives:
    return select("cpu", {"grouped_matmul": name}).grouped


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, RowGroups]:
    """Rows, weights, output gradient, groups; three rows past the last group are NaN."""
    x, dy = torch.randn(NUM_ROWS, WIDTH_IN), torch.randn(NUM_ROWS, WIDTH_OUT)
    x[sum(COUNTS) :] = dy[sum(COUNTS) :] = math.nan
    weight = torch.randn(len(COUNTS), WIDTH_OUT, WIDTH_IN)
    return x.to(dtype), weight.to(dtype), dy.to(dtype), RowGroups.of(torch.tensor(COUNTS))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_each_row_meets_its_own_expert_forward_and_backward(name, dtype):
    x, weight, dy, groups = problem(dtype)
    x.requires_grad_(), weight.requires_grad_()
    y = grouped_matmul(x, weight, groups, primitives_of(name))
    y.backward(dy)
    assert y.dtype == x.grad.dtype == weight.grad.dtype == dtype

    start = 0
    for expert, count in enumerate(COUNTS):
        rows, start = slice(start, start + count), start + count
        exact_x, exact_dy, exact_w = (t.detach().double() for t in (x[rows], dy[rows], weight[expert]))
        assert_close_relative(y[rows], exact_x @ exact_w.t(), TOLERANCE[dtype], f"rows of expert {expert}")
        assert_close_relative(x.grad[rows], exact_dy @ exact_w, TOLERANCE[dtype], f"row gradient {expert}")
        assert_close_relative(weight.grad[expert], exact_dy.t() @ exact_x, TOLERANCE[dtype], f"dw {expert}")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_expert_without_rows_gets_a_gradient_of_zeros(name):
    x, weight, dy, groups = problem(torch.float32)
    dw = primitives_of(name).grads_by_rows(dy, x, groups)
    assert not dw[[1, 3]].any() and dw[[0, 2, 4]].any()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_rows_at_all_give_zero_weight_gradients(name):
    groups = RowGroups.of(torch.zeros(2, dtype=torch.int64))
    weight = torch.randn(2, 8, 8, requires_grad=True)
    grouped_matmul(torch.empty(0, 8), weight, groups, primitives_of(name)).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(2, 8, 8))


def test_frozen_weights_and_rows_get_no_gradient():
    x, weight, dy, groups = problem(torch.float32)
    rows_only = grouped_matmul(x.requires_grad_(), weight, groups, primitives_of("cpu"))
    rows_only.backward(dy)
    assert weight.grad is None and x.grad is not None
    x.grad = None
    grouped_matmul(x.detach(), weight.requires_grad_(), groups, primitives_of("cpu")).backward(dy)
    assert x.grad is None and weight.grad is not None


def test_blackwell_leaving_an_empty_expert_unwritten_would_not_be_seen(monkeypatch):
    # That card's kernel leaves the buffer's old content where an expert has no rows.
    x, weight, dy, groups = problem(torch.float32)
    true_kernel = torch.nn.functional.grouped_mm

    def unwritten(a, b, *, offs):
        return true_kernel(a, b, offs=offs).masked_fill((groups.counts_E == 0)[:, None, None], math.nan)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", unwritten)
    assert primitives_of("torch_native").grads_by_rows(dy, x, groups).isfinite().all()


def experts_problem(dtype=torch.float64, *, num_experts=6, num_tokens=7, num_picks=3):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:num_picks] for _ in range(num_tokens)])
    wide = torch.promote_types(dtype, torch.float32)
    weights = torch.rand(num_tokens, num_picks, generator=generator).to(wide).requires_grad_()
    return draw(num_tokens, 8), weights, ids, draw(num_experts, 16, 8), draw(num_experts, 8, 8)


def dense_experts(x, weights, ids, gate_up, down, experts):
    """Every token through the experts it picked among `experts`, one by one."""
    y = torch.zeros_like(x)
    for token, pick in [(t, k) for t in range(ids.shape[0]) for k in range(ids.shape[1])]:
        expert = int(ids[token, pick])
        if expert in experts:
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            part = weights[token, pick] * (down[expert] @ (torch.nn.functional.silu(gate) * up))
            y = y + torch.nn.functional.one_hot(torch.tensor(token), len(x))[:, None] * part
    return y


@pytest.mark.parametrize("chunk_rows", [1, 4, 1024])
@pytest.mark.parametrize("first, num_local", [(0, 6), (2, 2), (4, 2)])
def test_the_fused_experts_equal_token_by_token_experts(monkeypatch, first, num_local, chunk_rows):
    monkeypatch.setattr(cpu_experts, "_CHUNK_ROWS", chunk_rows)
    x, weights, ids, gate_up, down = experts_problem()
    grad = torch.randn(7, 8, dtype=torch.float64)
    local = slice(first, first + num_local)
    expected = dense_experts(x, weights, ids, gate_up, down, range(first, first + num_local))
    inputs = (x, weights, gate_up, down)
    expected_grads = torch.autograd.grad(expected, inputs, grad)
    rows = sort_picks(ids, first=first, num_local=num_local)
    actual = expert_mlp(x, weights, rows, gate_up[local], down[local])
    actual_grads = torch.autograd.grad(actual, inputs, grad)
    assert_close_relative(actual, expected, 1e-14, "output")
    for what, got, wanted in zip(("tokens", "weights", "gate_up", "down"), actual_grads, expected_grads, strict=True):
        assert_close_relative(got, wanted, 1e-14, f"gradient of {what}")


def test_the_fused_experts_give_the_same_bits_each_time():
    x, weights, ids, gate_up, down = experts_problem(torch.float32, num_tokens=200)
    rows, runs = sort_picks(ids, first=0, num_local=6), []
    torch.set_num_threads(2)
    for _ in range(3):
        y = expert_mlp(x, weights, rows, gate_up, down)
        runs.append((y, *torch.autograd.grad(y.square().sum(), (x, weights, gate_up, down))))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_the_fused_experts_compute_in_the_dtype_of_the_tokens_and_keep_that_of_the_weights():
    x, weights, ids, gate_up, down = experts_problem(torch.float32)
    rows = sort_picks(ids, first=0, num_local=6)
    exact = expert_mlp(x, weights, rows, gate_up, down)
    grad = torch.randn(7, 8)
    exact_grads = torch.autograd.grad(exact, (x, weights, gate_up, down), grad)
    narrow = x.detach().bfloat16().requires_grad_()
    y = expert_mlp(narrow, weights, rows, gate_up, down)
    grads = torch.autograd.grad(y, (narrow, weights, gate_up, down), grad)
    assert [t.dtype for t in (y, *grads)] == [torch.float32, torch.bfloat16, *3 * [torch.float32]]
    for got, wanted in zip((y, *grads), (exact, *exact_grads), strict=True):
        # bfloat16 keeps 8 bits and each value passes through four roundings; float32 would be at 1e-6.
        assert_close_relative(got, wanted, 2e-2, "bfloat16")
        assert (got.double() - wanted.double()).norm() > 1e-4 * wanted.norm()


def test_the_fused_experts_leave_out_the_gradients_that_nobody_wants():
    x, weights, ids, gate_up, down = experts_problem()
    rows = sort_picks(ids, first=0, num_local=6)
    expert_mlp(x.detach(), weights, rows, gate_up.detach(), down).sum().backward()
    assert x.grad is None and gate_up.grad is None
    assert down.grad is not None and weights.grad is not None


def test_rows_hold_the_picks_of_local_experts_first_and_in_order():
    ids = torch.tensor([[4, 1], [0, 5], [5, 4], [2, 0]])
    rows = sort_picks(ids, first=4, num_local=2)
    assert rows.groups.counts_E.tolist() == [2, 2] and rows.groups.ends_E.tolist() == [2, 4]
    # Picks are numbered token * 2 + pick; expert 4 was named by picks 0 and 5, expert 5 by 3 and 4.
    assert rows.order_R[:4].tolist() == [0, 5, 3, 4]
    assert rows.token_R[:4].tolist() == [0, 2, 1, 2]
    assert rows.is_local_TK.tolist() == [[True, False], [False, True], [True, True], [False, False]]
    assert rows.position_TK[rows.is_local_TK].tolist() == [0, 2, 3, 1]


def test_the_row_buffer_is_as_small_as_static_shapes_allow():
    ids = torch.stack([torch.randperm(8)[:4] for _ in range(5)])
    assert len(sort_picks(ids, first=2, num_local=2).order_R) == 5 * 2
    assert len(sort_picks(ids, first=0, num_local=8).order_R) == 5 * 4


def test_moving_to_rows_and_back_is_differentiated_exactly():
    x, weights, ids, _, _ = experts_problem(num_tokens=4)
    rows = sort_picks(ids, first=1, num_local=4)

    def there_and_back(x, weights):
        # The rows of other ranks' experts are cut out of what comes after, as a kernel would.
        moved = tokens_to_rows(x, rows) ** 2
        return rows_to_tokens(moved, weights, rows)

    assert torch.autograd.gradcheck(there_and_back, (x, weights))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_whatever_a_kernel_leaves_in_rows_of_other_ranks_never_leaks(name):
    x, weights, ids, gate_up, down = experts_problem(torch.float32)
    rows, clean = sort_picks(ids, first=2, num_local=2), primitives_of(name)

    def poison(kernel):
        def poisoned(a, b, groups):
            result = kernel(a, b, groups).clone()
            result[int(groups.ends_E[-1]) :] = math.nan
            return result

        return poisoned

    poisoned = GroupedPrimitives(poison(clean.rows_by_weights), poison(clean.grads_by_weights), clean.grads_by_rows)
    results = []
    for primitives in (clean, poisoned):
        hidden = torch.tanh(grouped_matmul(tokens_to_rows(x, rows), gate_up[2:4], rows.groups, primitives))
        out = rows_to_tokens(grouped_matmul(hidden[:, :8], down[2:4], rows.groups, primitives), weights, rows)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, weights, gate_up, down))))
    assert len(rows.order_R) > int(rows.groups.ends_E[-1]), "the test needs rows past the last"
    for untouched, poisoned_result in zip(*results, strict=True):
        assert torch.equal(untouched, poisoned_result)


def test_kernels_are_chosen_by_device_and_config():
    others = ("permute", "swiglu", "rms_norm", "rotary", "attention")
    plain = dict.fromkeys(others, "reference")
    cuda = {"grouped_matmul": "torch_native", "expert_mlp": "composed", "vocabulary": "cuda"}
    npu = {"grouped_matmul": "npu", "expert_mlp": "composed", "vocabulary": "reference"}
    assert select("cpu").names == {**dict.fromkeys(("grouped_matmul", "expert_mlp", "vocabulary"), "cpu"), **plain}
    assert select("cuda").names == {**cuda, **plain}
    assert select("npu").names == {**npu, **dict.fromkeys(others, "npu")}
    assert select("cpu").expert_mlp is expert_mlp and select("cuda").expert_mlp is None


def test_overriding_the_grouped_matmul_also_leaves_the_fused_function_that_would_bypass_it():
    chosen = select("cpu", {"grouped_matmul": "reference"})
    assert isinstance(chosen, Kernels) and chosen.expert_mlp is None
    assert select("cuda", {"expert_mlp": "cpu"}).expert_mlp is expert_mlp


@pytest.mark.parametrize(
    "device, overrides, words",
    [
        ("mps", {}, ["'mps'", "cpu", "cuda", "npu"]),
        ("cpu", {"matmul": "cpu"}, ["kernels.matmul", "grouped_matmul"]),
        ("cpu", {"grouped_matmul": "fast"}, ["'fast'", "torch_native", "reference"]),
        ("cpu", {"rms_norm": "npu"}, ["kernels.rms_norm='npu'", "cpu", "reference"]),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(device, overrides, words):
    with pytest.raises(ConfigError) as raised:
        select(device, overrides)
    assert all(word in str(raised.value) for word in words)


LARGE = 40 << 20


def test_a_large_buffer_is_used_again_once_nothing_refers_to_it():
    first = pages.empty(LARGE, dtype=torch.uint8)
    address, part = first.data_ptr(), first[10:20].fill_(7)
    del first
    gc.collect()
    second = pages.empty(LARGE, dtype=torch.uint8)
    assert second.data_ptr() != address, "a view still lives there"
    assert part.tolist() == [7] * 10
    del part
    gc.collect()
    assert pages.empty(LARGE - 1, dtype=torch.uint8).data_ptr() == address


def test_kept_memory_never_exceeds_what_was_in_use_at_once():
    regions = pages._Regions()
    held = [regions.take(size) for size in (1 << 20, 2 << 20)]
    for region in held:
        regions.give_back(region)
    del held, region
    other = regions.take(3 << 20)
    assert regions._used_bytes + sum(map(len, regions._free)) == len(other) == 3 << 20


def test_large_and_small_buffers_are_ordinary_writable_tensors():
    for shape, dtype in (((3, 4), torch.float64), ((11, 1 << 20), torch.float32)):
        tensor = pages.empty(*shape, dtype=dtype)
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        assert tensor.fill_(2).sum().item() == 2 * math.prod(shape)
    weight = torch.zeros(11, 1 << 20, requires_grad=True)
    weight.grad = tensor
    torch.optim.SGD([weight], lr=0.5).step()
    assert weight[10, -1].item() == -1.0


def guarded(name: str, vocab_size: int) -> torch.Tensor:
    ids = torch.tensor([[3, 7, 1], [2, 6, 0]]) - (vocab_size == 5) * torch.tensor([[0, 0, 0], [0, 7, 0]])
    guard = select("cuda", {"vocabulary": name}).guard_ids
    return guard(torch.ones(2, 3, 4), ids, (ids < 0) | (ids >= vocab_size), what="token id", vocab_size=vocab_size)


def test_an_id_outside_of_the_vocabulary_is_an_error_or_nan_and_one_inside_is_neither():
    words = "A token id is not in the model's vocabulary, 0 to 4: "
    with pytest.raises(VocabularyError, match=rf"{words}7 at \[0, 1\]") as raised:
        guarded("cpu", 5)
    assert isinstance(raised.value, IndexError), "what one process raises"
    with pytest.raises(RuntimeError, match=f"{words}one of this batch"):
        guarded("cuda", 5)
    marked = guarded("reference", 5).isnan()
    assert marked.all(-1).tolist() == [[False, True, False], [False, True, False]] and int(marked.sum()) == 8
    for name in ("cpu", "cuda", "reference"):
        assert torch.equal(guarded(name, 8), torch.ones(2, 3, 4))
