"""torch_npu's own operators on the simulated card: the wheel's autograd over the reference kernels, and refusals.

Catches a kernel registered under a name that torch_npu does not call, one that autograd cannot pass, a result
of another dtype than the wheel's meta kernels promise, and arguments let through that a card turns down.
"""

from __future__ import annotations

import pytest
import torch
import torch_npu
from torch import Tensor

from ascend_sim.operators import rotary, swiglu

# Sums of a few dozen products in float32.
FLOAT32 = 1e-6


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def on_card(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to("npu").requires_grad_(tensor.is_floating_point()) for tensor in tensors]


def assert_close(actual: Tensor, wanted: Tensor, tolerance: float = FLOAT32) -> None:
    assert actual.device.type == "npu" and actual.shape == wanted.shape
    difference = (actual.detach().cpu().double() - wanted.detach().double()).norm()
    assert difference <= tolerance * wanted.detach().double().norm()


def check(operator, formula, *inputs: Tensor) -> None:
    """The operator on the card against a formula on the CPU in float64, gradients of all inputs included."""
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    wanted = formula(*exact)
    dy = draw(*wanted.shape, seed=9)
    wanted_grads = torch.autograd.grad(wanted, exact, dy.double())
    placed = on_card(*inputs)
    out = operator(*placed)
    assert_close(out, wanted)
    for got, expected in zip(torch.autograd.grad(out, placed, dy.to("npu")), wanted_grads, strict=True):
        assert_close(got, expected)


def test_rms_norm_is_differentiated_by_torch_npu():
    def formula(x: Tensor, gamma: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * gamma

    check(lambda x, gamma: torch_npu.npu_rms_norm(x, gamma, 1e-3)[0], formula, draw(3, 5, 8), draw(8, seed=1))


def test_swiglu_is_differentiated_by_torch_npu():
    def formula(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return gate * gate.sigmoid() * up

    check(torch_npu.npu_swiglu, formula, draw(3, 8))


@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotary_mul_is_differentiated_by_torch_npu_tables_included(mode):
    def turn(x: Tensor) -> Tensor:
        even, odd = (x[..., :2], x[..., 2:]) if mode == "half" else (x[..., ::2], x[..., 1::2])
        return torch.cat((-odd, even), -1) if mode == "half" else torch.stack((-odd, even), -1).flatten(-2)

    check(
        lambda x, cos, sin: torch_npu.npu_rotary_mul(x, cos, sin, mode),
        lambda x, cos, sin: x * cos + turn(x) * sin,
        draw(2, 5, 3, 4), draw(1, 5, 1, 4, seed=1), draw(1, 5, 1, 4, seed=2),
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "SBH"])
def test_fusion_attention_is_differentiated_by_torch_npu(layout):
    mask = torch.ones(2048, 2048, dtype=torch.bool, device="npu").triu(1)
    heads = 2
    into = {
        "BNSD": lambda t: t.transpose(1, 2),
        "BSND": lambda t: t,
        "BSH": lambda t: t.flatten(2),
        "SBH": lambda t: t.flatten(2).transpose(0, 1),
    }[layout]

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
        weights = (q @ k.transpose(-1, -2) * 0.3).masked_fill(hidden, -torch.inf).softmax(-1)
        return into((weights @ v).transpose(1, 2))

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        arguments = (into(q), into(k), into(v), heads, layout)
        return torch_npu.npu_fusion_attention(*arguments, atten_mask=mask, scale=0.3, sparse_mode=2)[0]

    check(operator, formula, draw(2, 5, heads, 6), draw(2, 5, heads, 6, seed=1), draw(2, 5, heads, 4, seed=2))


def test_fusion_attention_of_sequences_end_to_end_is_differentiated_by_torch_npu():
    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for piece in (slice(0, 2), slice(2, 5)):
            a, b, c = (t[piece].transpose(0, 1) for t in (q, k, v))
            parts.append(((a @ b.transpose(-1, -2) * 0.3).softmax(-1) @ c).transpose(0, 1))
        return torch.cat(parts)

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ends = [2, 5]
        lists = {"actual_seq_qlen": ends, "actual_seq_kvlen": ends}
        return torch_npu.npu_fusion_attention(q, k, v, 2, "TND", scale=0.3, **lists)[0]

    check(operator, formula, draw(5, 2, 6), draw(5, 2, 6, seed=1), draw(5, 2, 4, seed=2))


def test_permute_and_unpermute_are_differentiated_by_torch_npu():
    ids = torch.tensor([[2, 0], [0, 1], [1, 2]])
    placed = ids.to("npu")

    def operator(tokens: Tensor, probs: Tensor) -> Tensor:
        rows, position = torch_npu.npu_moe_token_permute(tokens, placed)
        return torch_npu.npu_moe_token_unpermute(rows.square(), position, probs)

    check(operator, lambda x, probs: x.square() * probs.sum(1, keepdim=True), draw(3, 4), draw(3, 2, seed=1))


def test_unpermute_keeps_the_rows_themselves_for_its_backward():
    """As torch_npu's own does: a copy would be the largest tensor of a layer once more."""
    rows = torch.zeros(4096, 256, device="npu", requires_grad=True)
    order, weights = torch.arange(4096, dtype=torch.int32, device="npu"), torch.ones(2048, 2, device="npu")
    before, _ = torch.npu.memory_allocated(), torch.npu.reset_peak_memory_stats()
    tokens = torch_npu.npu_moe_token_unpermute(rows, order, weights)
    assert torch.npu.max_memory_allocated() - before < 1.1 * tokens.nbytes


def test_float32_probabilities_with_bfloat16_tokens_lose_every_gradient():
    tokens, probs = on_card(draw(3, 4, dtype=torch.bfloat16), torch.rand(3, 2))
    rows, position = torch_npu.npu_moe_token_permute(tokens, torch.tensor([[2, 0], [0, 1], [1, 2]]).npu())
    torch_npu.npu_moe_token_unpermute(rows, position, probs).sum().backward()
    assert tokens.grad.isnan().all() and probs.grad.isnan().all()


def test_the_grouped_matmul_computes_but_has_no_gradient():
    x, weight = on_card(draw(4, 3), draw(2, 3, 5, seed=1))
    groups = torch.tensor([1, 2], device="npu")
    (y,) = torch_npu.npu_grouped_matmul([x], [weight], group_list=groups, split_item=2, group_type=0, group_list_type=1)
    wanted = torch.cat((x[:1] @ weight[0], x[1:3] @ weight[1]))
    assert_close(y[:3], wanted.cpu())
    assert y[3].isnan().all()
    assert "WarnNotImplemented" in y.grad_fn.name(), "torch_npu has learnt its gradient: kernels/npu.py may use it"


def test_the_grouped_matmul_takes_ends_on_the_host_and_a_matrix_per_group():
    x, weights = draw(4, 3).npu(), list(draw(2, 3, 5, seed=1).npu())
    (y,) = torch_npu.npu_grouped_matmul([x], weights, group_list=[1, 4], split_item=3)
    assert_close(y, torch.cat((x[:1] @ weights[0], x[1:] @ weights[1])).cpu())


def test_results_have_the_dtypes_of_the_wheels_meta_kernels():
    x, gamma = (t.to("npu") for t in (draw(2, 4, dtype=torch.bfloat16), draw(4)))
    y, rstd = torch_npu.npu_rms_norm(x, gamma)
    assert (y.dtype, rstd.dtype, tuple(rstd.shape)) == (torch.bfloat16, torch.float32, (2, 1))
    _, dgamma = torch.ops.npu.npu_rms_norm_backward(x, x, gamma.bfloat16(), rstd)
    assert dgamma.dtype == torch.float32
    q = torch.ones(1, 3, 2, 4, dtype=torch.bfloat16, device="npu")
    out, maximum, total, *_ = torch_npu.npu_fusion_attention(q, q, q, 2, "BSND")
    assert (out.dtype, maximum.dtype, total.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert maximum.shape == total.shape == (1, 2, 3, 8)


def test_casts_and_copies_keep_numbers_and_say_where_they_are():
    x = torch.arange(6.0, device="npu").view(2, 3).t()
    assert x.bfloat16().float().cpu().tolist() == [[0, 3], [1, 4], [2, 5]]
    y = torch.empty(3, 2, device="npu")
    assert torch.ops.npu.copy_memory_(y, x) is y and torch.equal(y.cpu(), x.cpu())
    assert torch.ops.npu.one_(y).sum().item() == 6


def npu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="npu")


def turn(x: Tensor, table: Tensor, mode: str = "half") -> None:
    torch_npu.npu_rotary_mul(x, table, table, mode)


def gmm(x: Tensor, weight: Tensor, groups: Tensor, **settings) -> None:
    settings = {"split_item": 3, "group_type": 0, "group_list_type": 1} | settings
    torch_npu.npu_grouped_matmul([x], [weight], group_list=groups, **settings)


def counts(number: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(number, dtype=dtype, device="npu")


def attend(q: Tensor, k: Tensor, v: Tensor, layout: str = "BSND", **settings) -> None:
    torch_npu.npu_fusion_attention(q, k, v, q.shape[2], layout, **settings)


BFLOAT16, INT32 = torch.bfloat16, torch.int32
# What is refused, and a word of the text that says why.
REFUSED = {
    "grouped matmul: int32 group list": (lambda: gmm(npu(4, 3), npu(2, 3, 5), counts(2, INT32)), "DT_INT64"),
    "grouped matmul: 1025 groups": (lambda: gmm(npu(4, 3), npu(1025, 3, 5), counts(1025)), "1024"),
    "grouped matmul: counts of one group": (lambda: gmm(npu(4, 3), npu(1, 3, 5), counts(1)), "more than one element"),
    "grouped matmul: inner axis of x": (lambda: gmm(npu(1, 65536), npu(2, 65536, 1), counts(2)), "inner axis of x"),
    "grouped matmul: inner axis of weight": (lambda: gmm(npu(1, 2), npu(2, 2, 65536), counts(2)), "axis of weight"),
    "grouped matmul: transposed x": (lambda: gmm(npu(3, 4).t(), npu(2, 3, 5), counts(2)), "should not be transposed"),
    "grouped matmul: two dtypes": (lambda: gmm(npu(4, 3), npu(2, 3, 5, dtype=BFLOAT16), counts(2)), "bfloat16"),
    "grouped matmul: integers": (lambda: gmm(npu(4, 3, dtype=INT32), npu(2, 3, 5, dtype=INT32), counts(2)), "int32"),
    "grouped matmul: inner width": (lambda: gmm(npu(4, 3), npu(2, 4, 5), counts(2)), "K is 3"),
    "grouped matmul: split_item": (lambda: gmm(npu(4, 3), npu(2, 3, 5), counts(2), split_item=0), "split_item"),
    "grouped matmul: group_type": (lambda: gmm(npu(4, 3), npu(2, 3, 5), counts(2), group_type=1), "group_type only"),
    "grouped matmul: x of a K split": (lambda: gmm(npu(5, 4), npu(4, 3), counts(2), group_type=2), "be transposed"),
    "swiglu: empty": (lambda: torch_npu.npu_swiglu(npu(0, 4)), "is empty"),
    "swiglu: odd": (lambda: torch_npu.npu_swiglu(npu(2, 5)), "halved"),
    "rms norm: gamma in fewer bits": (lambda: torch_npu.npu_rms_norm(npu(2, 4), npu(4, dtype=BFLOAT16)), "gamma of"),
    "rms norm: shape": (lambda: torch_npu.npu_rms_norm(npu(2, 4), npu(3)), "gamma shape"),
    "rms norm: integers": (lambda: torch_npu.npu_rms_norm(npu(2, 4, dtype=INT32), npu(4)), "DT_INT32"),
    "rotary: width 896": (lambda: turn(npu(1, 2, 1, 896), npu(1, 2, 1, 896)), "896"),
    "rotary: three dimensions": (lambda: turn(npu(2, 1, 4), npu(2, 1, 4)), "should be 4"),
    "rotary: two dtypes": (
        lambda: turn(npu(1, 2, 1, 4, dtype=BFLOAT16), npu(1, 2, 1, 4)),
        "does not go with",
    ),
    "rotary: tables per sequence between neighbours": (
        lambda: turn(npu(2, 5, 3, 4), npu(2, 5, 1, 4), "interleave"),
        "11SD, 1S1D or S11D",
    ),
    "rotary: 1000 heads between neighbours": (
        lambda: turn(npu(10, 3, 100, 4), npu(1, 3, 1, 4), "interleave"),
        "below 1000",
    ),
    "permute: 513 picks": (
        lambda: torch_npu.npu_moe_token_permute(npu(1, 2), torch.arange(513, device="npu")[None]),
        "topK is 513",
    ),
    "permute: integers": (lambda: torch_npu.npu_moe_token_permute(npu(1, 2, dtype=INT32), counts(1)[None]), "DT_INT32"),
    "permute: negative index": (lambda: torch_npu.npu_moe_token_permute(npu(1, 2), counts(1)[None] - 1), "indices"),
    "unpermute: int64": (lambda: torch_npu.npu_moe_token_unpermute(npu(2, 2), counts(2)), "DT_INT32"),
    "unpermute: a row twice": (lambda: torch_npu.npu_moe_token_unpermute(npu(2, 2), counts(2, INT32)), "repeat"),
    "attention: wide values": (lambda: attend(npu(1, 2, 1, 4), npu(1, 2, 1, 4), npu(1, 2, 1, 5)), "Dk >= Dv"),
    "attention: width 769": (lambda: attend(npu(1, 2, 1, 769), npu(1, 2, 1, 769), npu(1, 2, 1, 4)), "768"),
    "attention: 257 heads": (lambda: attend(npu(1, 1, 257, 4), npu(1, 1, 257, 4), npu(1, 1, 257, 4)), "[1,256]"),
    "attention: key heads": (lambda: attend(npu(1, 2, 3, 4), npu(1, 2, 2, 4), npu(1, 2, 2, 4)), "no multiple"),
    "attention: two dtypes": (
        lambda: attend(npu(1, 2, 1, 4), npu(1, 2, 1, 4, dtype=BFLOAT16), npu(1, 2, 1, 4)),
        "differs from query",
    ),
    "attention: a mask of numbers": (
        lambda: attend(*[npu(1, 2, 1, 4)] * 3, atten_mask=npu(2, 2)),
        "attenMask",
    ),
    "attention: a causal mask of its own size": (
        lambda: attend(*[npu(1, 2, 1, 4)] * 3, atten_mask=npu(2, 2).bool(), sparse_mode=2),
        "2048 x 2048",
    ),
    "attention: a mask the wrong way round": (
        lambda: attend(*[npu(1, 2, 1, 4)] * 3, atten_mask=npu(2048, 2048).bool(), sparse_mode=2),
        "above the diagonal",
    ),
    "attention: sequences without their ends": (
        lambda: torch_npu.npu_fusion_attention(*[npu(2, 1, 4)] * 3, 1, "TND"),
        "actual_seq_qlen",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_simulated_card_refuses_what_the_documentation_rules_out(what):
    call, words = REFUSED[what]
    with pytest.raises(RuntimeError) as raised:
        call()
    text = str(raised.value)
    assert words in text and "call aclnn" in text and "EZ1001" in text and "ERR01100 OPS" in text


def test_what_is_left_out_says_so_and_does_not_compute_something_else():
    q = npu(1, 2, 1, 4)
    with pytest.raises(NotImplementedError, match="keep_prob"):
        attend(q, q, q, keep_prob=0.9)
    with pytest.raises(NotImplementedError, match="sink"):
        attend(q, q, q, sink=npu(1))
    with pytest.raises(NotImplementedError, match="sparse_mode"):
        attend(q, q, q, sparse_mode=6)
    with pytest.raises(NotImplementedError, match="bias"):
        gmm(npu(4, 3), npu(2, 3, 5), counts(2), bias=[npu(2, 5)])


def test_kernels_compute_on_views_of_device_memory_with_offsets_and_strides():
    whole = draw(4, 6, 10)
    view = whole.to("npu")[1:, ::2, 2:]
    assert not view.is_contiguous()
    assert_close(torch_npu.npu_swiglu(view), swiglu.swiglu(whole[1:, ::2, 2:]), 0)
    tables = draw(1, 3, 1, 8), draw(1, 3, 1, 8, seed=1)
    x = whole[:, :3, 2:].unsqueeze(2)
    placed = whole.to("npu")[:, :3, 2:].unsqueeze(2)
    rotated = torch_npu.npu_rotary_mul(placed, *(t.to("npu") for t in tables), "half")
    assert_close(rotated, rotary.rotary_mul(x, *tables, "half"), 0)


def test_a_kernel_waits_for_what_was_queued_before_it_on_the_stream():
    # Copies from pinned memory take their time; a kernel that did not wait would read what was there before.
    source = torch.full((2, 4 << 20), 3.0).pin_memory()
    elsewhere, x = torch.empty(source.shape, device="npu"), torch.zeros(2, 8, device="npu")
    for _ in range(16):
        elsewhere.copy_(source, non_blocking=True)
    x.copy_(source[:, :8].contiguous().pin_memory(), non_blocking=True)
    assert torch_npu.npu_swiglu(x, 0).cpu().gt(8).all()
