"""The simulator's operators against formulas written another way, in float64, forward and backward.

Catches a reference kernel that is wrong, which would make every test on the simulated card falsely green: a
sign of a rotation, a mask from the wrong corner, a group without rows, a gradient that forgets a factor.
Here the kernels' own functions compute on CPU tensors; test_operators_device.py runs them as operators.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ascend_sim.operators import attention, grouped, norm, permute, rotary, swiglu

EXACT = 1e-12


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_equal(actual: Tensor, wanted: Tensor, what: str = "", tolerance: float = EXACT) -> None:
    assert actual.shape == wanted.shape, what
    assert actual.isfinite().all(), what
    assert (actual - wanted).norm() <= tolerance * wanted.norm().clamp(min=1e-6), what


def gradients(formula, inputs: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(formula(*leaves), leaves, dy)


@pytest.mark.parametrize("shape, gamma_shape", [((5, 8), (8,)), ((2, 3, 4, 6), (6,)), ((3, 4, 5), (4, 5))])
def test_rms_norm_and_its_gradients_equal_the_formula(shape, gamma_shape):
    x, gamma, dy = draw(*shape), draw(*gamma_shape, seed=1), draw(*shape, seed=2)
    size = math.prod(gamma_shape)

    def formula(x: Tensor, gamma: Tensor) -> Tensor:
        flat = x.reshape(-1, size)
        scale = (flat.pow(2).sum(1, keepdim=True) / size + 1e-3).pow(-0.5)
        return (flat * scale * gamma.reshape(-1)).view(shape)

    y, rstd = norm.rms_norm(x, gamma, 1e-3)
    assert_equal(y, formula(x, gamma))
    actual = norm.rms_norm_backward(dy, x, gamma, rstd)
    for got, wanted in zip(actual, gradients(formula, [x, gamma], dy), strict=True):
        assert_equal(got, wanted)


def test_rms_norm_sums_the_squares_in_float32_and_gives_dgamma_in_float32():
    x = torch.ones(1, 4096, dtype=torch.bfloat16)
    gamma = torch.ones(4096, dtype=torch.bfloat16)
    y, rstd = norm.rms_norm(x, gamma, 0.0)
    assert y.eq(1).all() and y.dtype == torch.bfloat16 and rstd.shape == (1, 1)
    dx, dgamma = norm.rms_norm_backward(x, x, gamma, rstd)
    assert (dx.dtype, dgamma.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_swiglu_and_its_gradient_equal_the_formula(dim):
    x = draw(4, 6, 8)
    dy = draw(*swiglu.swiglu(x, dim).shape, seed=1)

    def formula(x: Tensor) -> Tensor:
        half = x.shape[dim] // 2
        gate, up = x.narrow(dim, 0, half), x.narrow(dim, half, half)
        return gate / (1 + torch.exp(-gate)) * up

    assert_equal(swiglu.swiglu(x, dim), formula(x))
    assert_equal(swiglu.swiglu_backward(dy, x, dim), gradients(formula, [x], dy)[0])


@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize("table", [(1, 5, 1), (2, 5, 1), (2, 5, 3)])
def test_rotation_equals_a_product_of_complex_numbers(mode, table):
    x, angle, dy = draw(2, 5, 3, 8), draw(*table, 4, seed=1), draw(2, 5, 3, 8, seed=2)

    def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
        return (x[..., :4], x[..., 4:]) if mode == "half" else (x[..., ::2], x[..., 1::2])

    def full(half: Tensor) -> Tensor:
        return torch.cat((half, half), -1) if mode == "half" else half.repeat_interleave(2, -1)

    def formula(x: Tensor) -> Tensor:
        first, second = pairs(x)
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
        parts = torch.view_as_real(turned)
        return parts.transpose(-1, -2).flatten(-2) if mode == "half" else parts.flatten(-2)

    cos, sin = full(angle.cos()), full(angle.sin())
    assert_equal(rotary.rotary_mul(x, cos, sin, mode), formula(x))
    dx, dcos, dsin = rotary.rotary_mul_backward(dy, x, cos, sin, mode)
    assert_equal(dx, gradients(formula, [x], dy)[0])
    # The tables' gradients: by differences, since the operator is linear in them.
    for table_grad, wiggle in ((dcos, (1.0, 0.0)), (dsin, (0.0, 1.0))):
        direction = draw(*cos.shape, seed=3)
        moved = rotary.rotary_mul(x, cos + wiggle[0] * direction, sin + wiggle[1] * direction, mode)
        slope = ((moved - rotary.rotary_mul(x, cos, sin, mode)) * dy).sum()
        assert_equal((table_grad * direction).sum(), slope)


def test_rotation_by_a_matrix_equals_the_mode_that_it_spells():
    x, cos, sin = draw(1, 2, 3, 4), draw(1, 2, 1, 4, seed=1), draw(1, 2, 1, 4, seed=2)
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    matrix[2, 0] = matrix[3, 1] = -1.0
    matrix[0, 2] = matrix[1, 3] = 1.0
    assert_equal(rotary.rotary_mul(x, cos, sin, "half", matrix), rotary.rotary_mul(x, cos, sin, "half"))


COUNTS = [3, 0, 2, 0]


@pytest.mark.parametrize("cumulative", [False, True])
@pytest.mark.parametrize("several_weights", [False, True])
def test_the_grouped_product_by_rows_multiplies_each_row_by_its_groups_matrix(cumulative, several_weights):
    x, weight = draw(7, 4), draw(4, 4, 5, seed=1)
    group_list = torch.tensor(COUNTS).cumsum(0) if cumulative else torch.tensor(COUNTS)
    weights = list(weight) if several_weights else [weight]
    (y,) = grouped.grouped_matmul(
        [x], weights, group_list=group_list, split_item=2, group_type=0, group_list_type=int(not cumulative)
    )
    group_of_row = [0, 0, 0, 2, 2]
    for row, group in enumerate(group_of_row):
        assert_equal(y[row], torch.einsum("k,kn->n", x[row], weight[group]))
    assert y[5:].isnan().all(), "rows past the last group are whatever the memory held"


def test_the_grouped_product_by_the_summed_axis_is_the_sum_of_the_rows_outer_products():
    dy, x = draw(7, 5), draw(7, 4, seed=1)
    (dw,) = grouped.grouped_matmul(
        [dy.t()], [x], group_list=torch.tensor(COUNTS), split_item=3, group_type=2, group_list_type=1
    )
    assert_equal(dw[0], sum(torch.outer(dy[row], x[row]) for row in (0, 1, 2)))
    assert_equal(dw[2], sum(torch.outer(dy[row], x[row]) for row in (3, 4)))
    assert dw[[1, 3]].isnan().all(), "nobody writes the product of a group without rows"


def test_grouped_products_of_a_list_of_pairs_come_one_by_one():
    a, b = draw(2, 3), draw(3, 4, seed=1)
    first, second = grouped.grouped_matmul([a, b], [b, b.t()], group_type=-1)
    assert_equal(first, torch.einsum("mk,kn->mn", a, b))
    assert_equal(second, torch.einsum("mk,nk->mn", b, b))


INDICES = torch.tensor([[2, 0], [0, 1], [1, 2], [0, 2]])


@pytest.mark.parametrize("kept", [None, 8, 6, -3])
def test_permuted_rows_are_sorted_by_expert_and_then_by_pick(kept):
    tokens = draw(4, 3)
    rows, position = permute.permute(tokens, INDICES, kept)
    picks = sorted((int(expert), number) for number, expert in enumerate(INDICES.flatten()))
    number_kept = 8 if kept is None else kept if kept > 0 else 8 + kept
    assert len(rows) == number_kept and position.dtype == torch.int32
    for row, (_, pick) in enumerate(picks):
        assert position[pick] == row
        if row < number_kept:
            assert torch.equal(rows[row], tokens[pick // 2])


@pytest.mark.parametrize("kept", [None, 5])
def test_gradients_of_permute_and_unpermute_are_those_of_gather_and_weighted_sum(kept):
    tokens, probs = draw(4, 3), draw(4, 2, seed=1)
    rows, position = permute.permute(tokens, INDICES, kept)
    position, number = position.long(), len(rows)

    def there(tokens: Tensor) -> Tensor:
        selected = torch.zeros(number, 4, dtype=torch.float64)
        for pick, row in enumerate(position.tolist()):
            if row < number:
                selected[row, pick // 2] = 1
        return selected @ tokens

    def back(rows: Tensor, probs: Tensor) -> Tensor:
        sums = []
        for token in range(4):
            picks = [(row, k) for k, row in enumerate(position.view(4, 2)[token].tolist()) if row < number]
            sums.append(sum((probs[token, k] * rows[row] for row, k in picks), 0 * rows[0] * probs[token, 0]))
        return torch.stack(sums)

    assert_equal(rows, there(tokens))
    drows, dtokens = draw(number, 3, seed=2), draw(4, 3, seed=3)
    sorted_indices = position.int()
    assert_equal(permute.permute_grad(drows, sorted_indices, 4, torch.float64, 2), gradients(there, [tokens], drows)[0])
    assert_equal(permute.unpermute(rows, sorted_indices, probs), back(rows, probs))
    actual = permute.unpermute_grad(dtokens, sorted_indices, number, torch.float64, probs, permuted_tokens=rows)
    for got, wanted in zip(actual, gradients(back, [rows, probs], dtokens), strict=True):
        assert_equal(got, wanted)


def test_unpermute_without_probabilities_puts_rows_back():
    tokens = draw(4, 3)
    rows, position = permute.permute(tokens, torch.tensor([3, 0, 2, 1]))
    assert torch.equal(permute.unpermute(rows, position), tokens)
    drows, nothing = permute.unpermute_grad(tokens, position, 4, torch.float64)
    assert torch.equal(drows, rows) and nothing is None


def test_probabilities_of_another_dtype_have_gradients_that_are_not_numbers():
    tokens = draw(4, 3).bfloat16()
    rows, position = permute.permute(tokens, INDICES)
    arguments = (tokens, position, 8, torch.bfloat16)
    wrong = permute.unpermute_grad(*arguments, torch.rand(4, 2), permuted_tokens=rows)
    right = permute.unpermute_grad(*arguments, torch.rand(4, 2).bfloat16(), permuted_tokens=rows)
    assert all(gradient.isnan().all() for gradient in wrong)
    assert all(gradient.isfinite().all() for gradient in right)


# Batch, query heads, key heads, query length, key length, key width, value width.
SIZES = {"plain": (2, 4, 4, 6, 6, 5, 5), "mla": (2, 2, 2, 6, 6, 6, 4), "gqa": (1, 4, 2, 5, 7, 4, 4)}
COMPRESSED = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
INTO = {
    "BNSD": lambda t: t,
    "BSND": lambda t: t.permute(0, 2, 1, 3),
    "BSH": lambda t: t.permute(0, 2, 1, 3).reshape(t.shape[0], t.shape[2], -1),
    "SBH": lambda t: t.permute(2, 0, 1, 3).reshape(t.shape[2], t.shape[0], -1),
}
SCALE = 0.37


def loop_attention(q: Tensor, k: Tensor, v: Tensor, is_hidden) -> Tensor:
    """Attention query by query; [B, N, S, V]."""
    out = []
    for b, n, i in ((b, n, i) for b in range(len(q)) for n in range(q.shape[1]) for i in range(q.shape[2])):
        m = n * k.shape[1] // q.shape[1]
        seen = [j for j in range(k.shape[2]) if not is_hidden(b, n, i, j)]
        weights = torch.softmax(torch.stack([SCALE * q[b, n, i].dot(k[b, m, j]) for j in seen]), 0)
        out.append(sum(weight * v[b, m, j] for weight, j in zip(weights, seen, strict=True)))
    return torch.stack(out).view(*q.shape[:3], -1)


def masking(kind: str, batch: int, queries: int, keys: int):
    """Keyword arguments of the operator, and the same as a function of (b, n, i, j)."""
    given = torch.rand(batch, 1, queries, keys, generator=torch.Generator().manual_seed(5)) < 0.4
    given[..., 0] = False
    everything = 10**6
    return {
        "none": ({"sparse_mode": 3}, lambda b, n, i, j: False),
        "given": ({"atten_mask": given}, lambda b, n, i, j: bool(given[b, 0, i, j])),
        "shared": ({"atten_mask": given[0, 0]}, lambda b, n, i, j: bool(given[0, 0, i, j])),
        "all": (
            {"atten_mask": given, "sparse_mode": 1, "next_tockens": 0},
            lambda b, n, i, j: bool(given[b, 0, i, j]),
        ),
        "band": (
            {"atten_mask": torch.zeros(queries, keys, dtype=torch.bool), "pre_tockens": 2, "next_tockens": 1},
            lambda b, n, i, j: j - i > 1 or i - j > 2,
        ),
        "left up": ({"atten_mask": COMPRESSED, "sparse_mode": 2}, lambda b, n, i, j: j > i),
        "right down": ({"atten_mask": COMPRESSED, "sparse_mode": 3}, lambda b, n, i, j: j > i + keys - queries),
        "right down band": (
            {"atten_mask": COMPRESSED, "sparse_mode": 4, "pre_tockens": 2, "next_tockens": 0},
            lambda b, n, i, j: not -2 <= j - i - (keys - queries) <= 0,
        ),
        "bytes": (
            {"atten_mask": given.to(torch.uint8), "pre_tockens": everything, "next_tockens": everything},
            lambda b, n, i, j: bool(given[b, 0, i, j]),
        ),
    }[kind]


def check_attention(size: str, kind: str, layout: str) -> None:
    batch, heads, key_heads, queries, keys, width, value_width = SIZES[size]
    q, k, v = (
        draw(batch, heads, queries, width),
        draw(batch, key_heads, keys, width, seed=1),
        draw(batch, key_heads, keys, value_width, seed=2),
    )
    settings, is_hidden = masking(kind, batch, queries, keys)
    into = INTO[layout]
    dy = draw(batch, heads, queries, value_width, seed=3)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return into(loop_attention(q, k, v, is_hidden))

    arguments = (into(q), into(k), into(v))
    out, maximum, total, *_ = attention.fusion_attention(*arguments, heads, layout, scale=SCALE, **settings)
    assert_equal(out, formula(q, k, v), f"{size} {kind} {layout}")
    assert maximum.shape == total.shape == (batch, heads, queries, 8)
    actual = attention.fusion_attention_grad(
        *arguments, into(dy), heads, layout, softmax_max=maximum, softmax_sum=total, scale_value=SCALE, **settings
    )[:3]
    for got, wanted in zip(actual, gradients(formula, [q, k, v], into(dy)), strict=True):
        assert_equal(got, into(wanted), f"gradient, {size} {kind} {layout}")


KINDS = ("none", "given", "shared", "all", "band", "left up", "right down", "right down band", "bytes")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_attention_under_every_mask_equals_a_loop_over_the_queries(size, kind):
    check_attention(size, kind, "BNSD")


@pytest.mark.parametrize("layout", INTO)
def test_attention_reads_and_writes_every_layout(layout):
    check_attention("mla", "left up", layout)
    check_attention("gqa", "right down", layout)


def test_sequences_of_several_lengths_do_not_see_each_other():
    ends_q, ends_k = [3, 3, 5, 0], [3, 4, 7, 0]
    q, k, v = draw(6, 4, 6), draw(8, 2, 6, seed=1), draw(8, 2, 4, seed=2)
    dy = draw(6, 4, 4, seed=3)
    settings = {
        "actual_seq_qlen": ends_q,
        "actual_seq_kvlen": ends_k,
        "atten_mask": COMPRESSED,
        "sparse_mode": 3,
    }
    pieces = [(slice(0, 3), slice(0, 3)), (slice(3, 5), slice(4, 7))]

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for rows, keys in pieces:
            shift = (keys.stop - keys.start) - (rows.stop - rows.start)
            one = (t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys]))
            out.append(loop_attention(*one, lambda b, n, i, j, shift=shift: j > i + shift)[0].transpose(0, 1))
        return torch.cat(out)

    out, maximum, total, *_ = attention.fusion_attention(q, k, v, 4, "TND", scale=SCALE, **settings)
    assert_equal(out[:5], formula(q, k, v))
    assert out[5:].isnan().all(), "a sequence that takes no part is not written"
    assert maximum.shape == total.shape == (6, 4, 8)
    actual = attention.fusion_attention_grad(
        q, k, v, dy, 4, "TND", softmax_max=maximum, softmax_sum=total, scale_value=SCALE, **settings
    )[:3]
    for got, wanted in zip(actual, gradients(formula, [q, k, v], dy[:5]), strict=True):
        assert_equal(got, wanted)


def test_more_queries_than_keys_from_the_lower_right_give_zeros_for_those_that_see_nothing():
    q, k = draw(1, 1, 4, 3), draw(1, 1, 2, 3, seed=1)
    out, *stats, _, _, _, _ = attention.fusion_attention(q, k, k, 1, "BNSD", atten_mask=COMPRESSED, sparse_mode=3)
    assert not out[0, 0, :2].any() and out[0, 0, 2:].isfinite().all()
    dq, dk, dv, *_ = attention.fusion_attention_grad(
        q, k, k, torch.ones_like(q), 1, "BNSD", softmax_max=stats[0], softmax_sum=stats[1],
        atten_mask=COMPRESSED, sparse_mode=3,
    )  # fmt: skip
    assert all(gradient.isfinite().all() for gradient in (dq, dk, dv))
