"""The package's kernels on the simulated card, through the real torch_npu, against its own on the CPU in float64.

Catches a fused operator called with the wrong half, scale, mask or transposition; a gradient that is missing or
reads what a kernel left uninitialised; and a fallback that nobody hears of. Whole models are next door.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from fused import ALL, BFLOAT16, FLOAT32, OPERATORS, Seen, distance, draw
from torch import Tensor

from lightning_npu_tp.kernels import REFERENCE, npu, npu_layers, npu_limits, plain, select
from lightning_npu_tp.kernels.grouped import RowGroups, grouped_matmul
from lightning_npu_tp.kernels.rows import sort_picks
from lightning_npu_tp.models.moe.experts import RoutedExperts


def compare(fused, reference, inputs: list[Tensor], dtype: torch.dtype, *, operation: str = "") -> None:
    """Outputs and gradients of `fused` on the card in `dtype` against `reference` on the CPU in float64.

    Integers and masks in the inputs go along. Fails as well when the fused operator did not run.
    """
    exact = [t.to(dtype).double() if t.is_floating_point() else t for t in inputs]
    exact = [t.requires_grad_() if t.is_floating_point() else t for t in exact]
    leaves = [t for t in exact if t.requires_grad]
    wanted = reference(*exact)
    dy = draw(*wanted.shape, seed=77, dtype=dtype)
    wanted_grads = torch.autograd.grad(wanted, leaves, dy.double())
    placed = [t.detach().to(dtype).to("npu") if t.is_floating_point() else t.to("npu") for t in exact]
    moving = [t.requires_grad_() for t in placed if t.is_floating_point()]
    with Seen() as seen:
        out = fused(*placed)
    if operation:
        assert OPERATORS[operation] & seen.names, f"{operation} fell to the reference"
    grads = torch.autograd.grad(out, moving, dy.to("npu").to(out.dtype))
    tolerance = FLOAT32 if dtype == torch.float32 else BFLOAT16
    for number, (got, expected) in enumerate(zip((out, *grads), (wanted, *wanted_grads), strict=True)):
        assert distance(got, expected) <= tolerance, f"result {number}: {distance(got, expected)}"


DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def say_everything_anew() -> Iterator[None]:
    npu_limits.forget()
    yield
    npu_limits.forget()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.endswith("npu_limits") and r.levelno == logging.WARNING]


# --- one operation at a time -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(dtype):
    inputs = [draw(2, 5, 16), draw(16, seed=1)]
    norms = (partial(kernel, eps=1e-3) for kernel in (npu_layers.rms_norm, plain.rms_norm))
    compare(*norms, inputs, dtype, operation="rms_norm")


def test_rms_norm_of_bfloat16_with_a_float32_weight_keeps_the_references_dtype():
    x, weight = draw(3, 16, dtype=torch.bfloat16), draw(16, seed=1, dtype=torch.float32)
    wanted = plain.rms_norm(x, weight, 1e-6)
    with Seen() as seen:
        got = npu_layers.rms_norm(x.npu(), weight.npu(), 1e-6)
    assert seen.names == {"npu_rms_norm"} and got.dtype == wanted.dtype == torch.float32
    assert distance(got, wanted) <= BFLOAT16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu(dtype):
    compare(npu_layers.swiglu, plain.swiglu, [draw(7, 12)], dtype, operation="swiglu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("own_tables", [True, False], ids=["tables per sequence", "one table"])
def test_rotation(interleaved, own_tables, dtype):
    # Angles stay in float32, as the decoder's tables do.
    angle = draw(2 if own_tables else 1, 5, 4, seed=1)

    def rotated(kernel, wide):
        def run(x: Tensor) -> Tensor:
            cos, sin = (t.to(x.device, wide) for t in (angle.cos(), angle.sin()))
            return kernel(x, cos, sin, interleaved=interleaved)

        return run

    pair = rotated(npu_layers.rotate, torch.float32), rotated(plain.rotate, torch.float64)
    compare(*pair, [draw(2, 5, 3, 8)], dtype, operation="rotary")


def test_rotation_of_many_sequences_is_not_cut_by_the_limit_on_heads_times_sequences():
    x, angle = draw(20, 3, 60, 4, dtype=torch.float32), draw(1, 3, 2, seed=1, dtype=torch.float32)
    cos, sin = angle.cos(), angle.sin()
    with Seen() as seen:
        got = npu_layers.rotate(x.npu(), cos.npu(), sin.npu(), interleaved=True)
    assert seen.names == {"npu_rotary_mul"}
    assert distance(got, plain.rotate(x, cos, sin, interleaved=True)) <= FLOAT32


ATTENTION = {"latent": (2, 4, 4, 9, 12, 8), "grouped": (2, 4, 2, 9, 8, 8), "plain": (1, 2, 2, 9, 4, 4)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", ["causal", "documents", "padding"])
@pytest.mark.parametrize("size", ATTENTION)
def test_attention(size, masked, dtype):
    batch, heads, key_heads, length, width, value_width = ATTENTION[size]
    mask = None
    if masked != "causal":
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        document = torch.arange(length) // 4
        if masked == "documents":
            mask = mask & (document[:, None] == document[None])
        else:
            mask = (mask & (torch.arange(length) > 2)) | torch.eye(length, dtype=torch.bool)
            mask = mask.expand(batch, 1, -1, -1).contiguous()

    def attention(kernel):
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            hidden = None if mask is None else mask.to(q.device)
            return kernel(q, k, v, mask=hidden, scale=0.41, dropout=0.0)

        return run

    inputs = [
        draw(batch, heads, length, width),
        draw(batch, key_heads, length, width, seed=1),
        draw(batch, key_heads, length, value_width, seed=2),
    ]
    compare(attention(npu_layers.attend), attention(plain.attend), inputs, dtype, operation="attention")


def test_one_query_over_a_cache_sees_every_key():
    q, k = draw(1, 2, 1, 4, dtype=torch.float32), draw(1, 2, 7, 4, seed=1, dtype=torch.float32)
    settings = {"mask": None, "scale": 0.5, "dropout": 0.0}
    got = npu_layers.attend(q.npu(), k.npu(), k.npu(), **settings)
    assert distance(got, plain.attend(q, k, k, **settings)) <= FLOAT32


def test_attention_in_a_validation_before_the_first_step_does_not_break_the_step():
    # Tensors made in inference mode, as Lightning's sanity check runs, cannot be kept for a backward.
    npu_layers._causal_masks.clear()
    q = draw(1, 2, 3, 4, dtype=torch.float32).npu()
    with torch.inference_mode():
        npu_layers.attend(q, q, q, mask=None, scale=0.5, dropout=0.0)
    q = q.requires_grad_()
    npu_layers.attend(q, q, q, mask=None, scale=0.5, dropout=0.0).sum().backward()
    assert q.grad.isfinite().all()


COUNTS = {"some empty": [3, 0, 5, 0, 1], "one expert": [6], "one has all": [0, 8, 0]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_the_grouped_matmul_with_experts_without_rows(counts, dtype):
    groups = RowGroups.of(torch.tensor(counts))
    placed = RowGroups(groups.counts_E.npu(), groups.ends_E.npu())
    used = sum(counts)
    # Rows past the last group: a gradient that read them would be far off.
    x, weight = draw(used + 4, 8), draw(len(counts), 6, 8, seed=1)

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return grouped_matmul(x, weight, groups, REFERENCE.grouped)[:used]

    def fused(x: Tensor, weight: Tensor) -> Tensor:
        return grouped_matmul(x, weight, placed, npu.PRIMITIVES)[:used]

    with_gradient = [x[:used], weight]
    compare(fused, reference, with_gradient, dtype, operation="grouped_matmul")
    whole = x.float().npu().requires_grad_()
    weight = weight.float().npu().requires_grad_()
    fused(whole, weight).square().sum().backward()
    assert whole.grad[:used].isfinite().all() and weight.grad.isfinite().all()
    assert not weight.grad[placed.counts_E == 0].any(), "an expert without rows has a gradient of zeros"


# --- the routed experts as a whole -------------------------------------------------------------------


def experts_on(device: str, dtype: torch.dtype, num_local: int, overrides: dict[str, str] | None = None) -> Any:
    experts = RoutedExperts(
        hidden_size=16, expert_width=24, num_local_experts=num_local, kernels=select(device, overrides)
    ).to(device, dtype)
    for number, parameter in enumerate(experts.parameters()):
        parameter.data.copy_(draw(*parameter.shape, seed=number) * 0.3)
    return experts


def run_experts(experts: Any, device: str, dtype: torch.dtype, first: int, num_local: int, idle: int | None) -> tuple:
    x = draw(11, 16, seed=5).to(dtype).to(device).requires_grad_()
    weights = draw(11, 3, seed=6).abs().to(torch.promote_types(dtype, torch.float32)).to(device).requires_grad_()
    choice = [expert for expert in range(8) if expert != idle]
    ids = torch.stack([torch.tensor(choice)[torch.randperm(len(choice), generator=_seeded(t))[:3]] for t in range(11)])
    rows = sort_picks(ids.to(device), first=first, num_local=num_local)
    y = experts(x, weights, rows)
    y.backward(draw(*y.shape, seed=7).to(dtype).to(device))
    return (y, x.grad, weights.grad, *(p.grad for p in experts.parameters()))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "first, num_local, idle", [(0, 8, None), (4, 4, None), (4, 4, 5), (2, 3, 3), (6, 2, None)], ids=str
)
def test_routed_experts_equal_the_cpus_whatever_lies_in_other_ranks_rows(first, num_local, idle, dtype):
    """The first case has all experts at home, the last more picks than experts; `idle` gets no token."""
    wanted = run_experts(experts_on("cpu", torch.float64, num_local), "cpu", torch.float64, first, num_local, idle)
    with Seen() as seen:
        got = run_experts(experts_on("npu", dtype, num_local), "npu", dtype, first, num_local, idle)
    assert {"npu_grouped_matmul", "npu_swiglu"} <= seen.names
    assert ("npu_moe_token_permute" in seen.names) == (num_local >= 3)
    # Four products in a row, inputs and weights rounded as well.
    tolerance = FLOAT32 if dtype == torch.float32 else 4 * BFLOAT16
    for number, (actual, expected) in enumerate(zip(got, wanted, strict=True)):
        assert distance(actual, expected) <= tolerance, f"result {number}"


def test_routed_experts_hold_no_row_longer_than_it_is_needed():
    """The arithmetic of `layer_memory.py`: inputs, hidden activations and results once, and one more set of rows."""
    hidden, width, picks = 512, 512, 8192
    experts = RoutedExperts(hidden_size=hidden, expert_width=width, num_local_experts=2, kernels=select("npu"))
    experts.to("npu")
    x = torch.zeros(picks // 2, hidden, device="npu", requires_grad=True)
    weights = torch.ones(picks // 2, 2, device="npu", requires_grad=True)
    rows = sort_picks(torch.tensor([[0, 1]], device="npu").expand(picks // 2, 2).contiguous(), first=0, num_local=2)
    before, _ = torch.npu.memory_allocated(), torch.npu.reset_peak_memory_stats()
    y = experts(x, weights, rows)
    one = picks * hidden * 4
    assert y.nbytes == one // 2
    # Permuted tokens, gate and up, their product, the result and its copy.
    assert torch.npu.max_memory_allocated() - before < (1 + 2 + 1 + 2 + 0.25) * one


def test_a_rank_without_tokens_computes_nothing_and_gives_zero_gradients(caplog):
    experts = experts_on("npu", torch.float32, 4)
    x = torch.empty(0, 16, device="npu", requires_grad=True)
    weights = torch.empty(0, 3, device="npu")
    rows = sort_picks(torch.empty(0, 3, dtype=torch.int64, device="npu"), first=0, num_local=4)
    experts(x, weights, rows).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())
    assert any("without elements" in line for line in warnings_of(caplog))


# --- fallbacks ---------------------------------------------------------------------------------------


def norm_of_two_dtypes() -> None:
    npu_layers.rms_norm(torch.ones(2, 4, device="npu"), torch.ones(4, dtype=torch.bfloat16, device="npu"), 1e-6)


def empty_swiglu() -> None:
    assert npu_layers.swiglu(torch.ones(0, 4, device="npu")).shape == (0, 2)


def wide_rotation() -> None:
    table = torch.ones(1, 2, 448, device="npu")
    npu_layers.rotate(torch.ones(1, 2, 1, 896, device="npu"), table, table, interleaved=False)


def attention_with(dropout: float = 0.0, width: int = 4, heads: int = 1) -> None:
    q = torch.ones(1, heads, 2, width, device="npu")
    npu_layers.attend(q, q, q, mask=None, scale=1.0, dropout=dropout)


def grouped(num_experts: int = 2, width: int = 4) -> None:
    groups = RowGroups.of(torch.ones(num_experts, dtype=torch.int64, device="npu"))
    npu.rows_by_weights(torch.ones(2, 4, device="npu"), torch.ones(num_experts, width, 4, device="npu"), groups)


def permute(num_tokens: int = 2, num_picks: int = 2, num_local: int = 2) -> None:
    ids = torch.arange(num_picks, device="npu").expand(num_tokens, -1)
    npu.tokens_to_rows(torch.ones(num_tokens, 2, device="npu"), sort_picks(ids, first=0, num_local=num_local))


def on_the_cpu() -> None:
    npu_layers.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6)


FALLBACKS = {
    "rms_norm": (norm_of_two_dtypes, "float32 with a weight of bfloat16"),
    "rms_norm on the cpu": (on_the_cpu, "lies on cpu"),
    "swiglu": (empty_swiglu, "without elements"),
    "rotary": (wide_rotation, "896"),
    "attention with dropout": (lambda: attention_with(dropout=0.1), "dropout"),
    "attention of wide heads": (lambda: attention_with(width=769), "769"),
    "attention of many heads": (lambda: attention_with(heads=257), "257 heads"),
    "grouped_matmul of many experts": (lambda: grouped(num_experts=1025), "1025 experts"),
    "grouped_matmul of wide experts": (lambda: grouped(width=65536), "65536"),
    "permute of many picks": (lambda: permute(num_picks=513, num_local=513), "513 experts per token"),
    "permute to few experts": (lambda: permute(num_local=1), "fewer experts on a rank than picks"),
}


@pytest.mark.parametrize("what", FALLBACKS)
def test_outside_of_its_limits_a_kernel_falls_to_the_reference_and_says_so_once(caplog, what):
    call, words = FALLBACKS[what]
    with Seen() as seen:
        call()
        call()
    assert not seen.names & ALL
    (line,) = warnings_of(caplog)
    operation = what.split()[0]
    assert words in line and f"kernels.{operation}" in line and f"kernels.{operation}=reference" in line


def test_within_the_limits_nothing_is_said(caplog):
    grouped(num_experts=3)
    permute()
    attention_with()
    assert not warnings_of(caplog)
