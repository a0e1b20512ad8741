"""The runtime of the simulated card under the real torch_npu: memory, events, errors, random numbers, optimizers.

Catches a card that has more memory than it should, forgets what it gave, draws other numbers in a replay, or trains
differently from the CPU.
"""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import time
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ascend_sim
from ascend_sim import report

GIB = 1 << 30
pytestmark = pytest.mark.filterwarnings(
    "ignore:TypedStorage is deprecated", "ignore:Cannot create tensor with internal"
)


def test_the_devices_are_those_that_were_asked_for() -> None:
    assert torch.npu.is_available() and torch.npu.device_count() == 4
    assert torch.npu.get_device_name() == "Ascend910B3"
    free, total = torch.npu.mem_get_info()
    assert total == 64 * GIB and 0 < free <= total
    with pytest.raises(RuntimeError):
        torch.zeros(1, device="npu:4")


def test_a_card_holds_its_memory_and_no_more() -> None:
    gc.collect()
    torch.npu.empty_cache()
    large = torch.empty(60 * GIB, dtype=torch.uint8, device="npu")
    with pytest.raises(RuntimeError, match=r"NPU out of memory. Tried to allocate 5.00 GiB \(NPU 0; 64.00 GiB total"):
        torch.empty(5 * GIB, dtype=torch.uint8, device="npu")
    # Another card has its own.
    torch.empty(5 * GIB, dtype=torch.uint8, device="npu:1")
    assert torch.npu.memory_allocated() >= 60 * GIB
    del large
    torch.npu.empty_cache()
    torch.empty(5 * GIB, dtype=torch.uint8, device="npu")
    torch.npu.empty_cache()


def test_the_allocator_counts_what_the_card_gave() -> None:
    gc.collect()
    torch.npu.empty_cache()
    torch.npu.reset_peak_memory_stats()
    before = torch.npu.memory_allocated()
    used = report.counters().get("memory.used.0", 0)
    x = torch.empty(100 << 20, dtype=torch.uint8, device="npu")
    assert torch.npu.memory_allocated() - before == pytest.approx(100 << 20, abs=4096)
    assert report.counters()["memory.used.0"] - used >= 100 << 20
    del x
    assert torch.npu.max_memory_allocated() - before >= 100 << 20
    torch.npu.empty_cache()
    assert report.counters()["memory.used.0"] <= used
    assert report.counters()["memory.peak.0"] >= 100 << 20


TENSORS = """
import random, torch, torch_npu
from lightning_npu_tp.estimates.step_memory import blocks
draw = random.Random(int({seed}))
sizes = [int(2 ** draw.uniform(16, 24)) for _ in range(120)]
kept = []
for number, size in enumerate(sizes, 1):
    kept.append(torch.empty(size, dtype=torch.uint8, device="npu"))
    assert torch.npu.memory_allocated() == blocks(sizes[:number]), (number, size)
print(sum(sizes), blocks(sizes))
"""


@pytest.mark.parametrize("seed", range(2))
def test_the_packages_arithmetic_cuts_blocks_as_the_real_allocator_does(seed: int) -> None:
    program = TENSORS.format(seed=seed)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    asked, counted = map(int, done.stdout.splitlines()[-1].split())
    # Otherwise nothing was rounded that matters.
    assert 1.01 * asked < counted


def test_events_know_when_they_were_recorded() -> None:
    begin, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    begin.record()
    time.sleep(0.02)
    end.record()
    end.synchronize()
    assert begin.query() and end.query() and 15 < begin.elapsed_time(end) < 5000


def test_pinned_memory_is_known_as_such() -> None:
    assert torch.empty(4).pin_memory().is_pinned() and not torch.empty(4).is_pinned()


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (torch.arange(12.0).view(3, 4), torch.float32),
        (torch.arange(12.0).view(3, 4).t(), torch.float32),
        (torch.arange(12.0).view(3, 4)[:, ::2], torch.bfloat16),
        (torch.tensor([1, 2, 3]), torch.float32),
        (torch.tensor([1 + 2j, 3j]).conj(), torch.complex64),
        (torch.empty(0, 3), torch.float32),
    ],
    ids=["plain", "transposed", "sliced and cast", "integers", "conjugate", "empty"],
)
def test_a_tensor_comes_back_from_the_card_as_it_went(source: torch.Tensor, wanted: torch.dtype) -> None:
    there = source.to("npu", dtype=wanted)
    assert torch.equal(there.cpu(), source.to(wanted).resolve_conj())
    into = torch.empty(tuple(reversed(source.shape)), dtype=wanted, device="npu").permute(
        *reversed(range(source.dim()))
    )
    into.copy_(source)
    assert torch.equal(into.cpu(), source.to(wanted).resolve_conj())
    back = torch.zeros(source.shape, dtype=source.dtype)
    back.copy_(there)
    assert torch.equal(back, source.to(wanted).resolve_conj().to(source.dtype))


def test_random_numbers_follow_the_state_of_the_card() -> None:
    torch.npu.manual_seed(3)
    first, state = torch.rand(8, device="npu"), torch.npu.get_rng_state()
    second = torch.randn(8, device="npu")
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.randn(8, device="npu"), second)
    torch.npu.manual_seed(3)
    assert torch.equal(torch.rand(8, device="npu"), first)
    host = torch.get_rng_state()
    torch.rand(8, device="npu")
    assert torch.equal(torch.get_rng_state(), host)
    generator = torch.Generator("npu").manual_seed(5)
    assert torch.rand(4, device="npu", generator=generator).std() > 0


def test_a_recomputed_forward_draws_the_same_mask() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x * 2, 0.5).square()

    grads = []
    for run in (lambda x: forward(x), lambda x: checkpoint(forward, x, use_reentrant=False)):
        x = torch.linspace(1, 2, 100, device="npu").requires_grad_()
        torch.npu.manual_seed(1)
        run(x).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads) and (grads[0] == 0).any()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 50))


def losses(model: nn.Module, device: str, **options: bool) -> list[float]:
    model = copy.deepcopy(model).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    tokens = torch.arange(48).view(4, 12).to(device)
    found = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), (tokens + 1).flatten() % 50)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
def test_training_gives_the_losses_of_the_cpu(options: dict[str, bool]) -> None:
    # The same CPU kernels, in float32: what differs is the order of a few sums.
    assert losses(network(), "npu", **options) == pytest.approx(losses(network(), "cpu", **options), rel=1e-5)


def test_autocast_and_the_gradient_scaler_work_on_the_card() -> None:
    model = network().to("npu")
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("npu", init_scale=1024.0)
    tokens = torch.arange(12, device="npu").view(1, 12)
    with torch.autocast("npu", dtype=torch.bfloat16):
        assert model[1](model[0](tokens)).dtype == torch.bfloat16
    before = [p.detach().clone() for p in model.parameters()]
    for poison in (False, True):
        with torch.autocast("npu", dtype=torch.float16):
            loss = model(tokens).square().mean() * (float("inf") if poison else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert moved is not poison
        before = [p.detach().clone() for p in model.parameters()]
    assert scaler.get_scale() == 512.0


def test_an_operator_without_a_kernel_falls_to_the_cpu_is_said_and_counted() -> None:
    x = torch.tensor([1, 2, 2, 3], device="npu")
    with warnings.catch_warnings(record=True), report.between() as grown:
        warnings.simplefilter("always")
        assert x.mode().values.item() == 2
    assert grown["fallback.aten::mode"] == 1


def test_waits_of_the_host_are_counted_where_they_can_block() -> None:
    torch.npu.synchronize()
    with report.between() as grown:
        torch.npu.synchronize()
    assert not {name for name in grown if name.startswith("sync.")}
    x = torch.ones(4, device="npu")
    report.trace_syncs()
    try:
        with report.between() as grown:
            x.sum().item()
            (x + 1).cpu()
            x.add_(1)
            torch.npu.synchronize()
            torch.npu.synchronize()
    finally:
        report.trace_syncs(False)
    waits = {name: value for name, value in grown.items() if name.startswith("sync.")}
    assert sum(waits.values()) == 3 and waits["sync.aten::_local_scalar_dense"] == 1
    assert sum(__file__ in line for line in ascend_sim.synchronisations()) == 3
    assert grown["operator.aten::sum"] == 1
