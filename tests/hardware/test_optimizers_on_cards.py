"""AdamWBF16 on a card: the same integers as on the CPU, to the bit, and masters that differ by rounding only.

Catches a card whose integers or conversions are not the CPU's, and operators that torch_npu sends to the host.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_npu_tp.optim import AdamWBF16
from lightning_npu_tp.optim.noise import noise
from lightning_npu_tp.optim.split_float import join, round_stochastically, split


def test_halves_and_random_bits_are_the_cpus(card: str) -> None:
    near_one = torch.arange(2**17, dtype=torch.int32) + 0x3F800000
    spread = torch.arange(-(2**31), 2**31 - 1, 2**13 + 1, dtype=torch.int64).to(torch.int32)
    values = torch.cat([near_one, near_one.neg(), spread])
    values = values.view(torch.float32)
    values = values[values.isfinite()]
    found = {}
    for device in ("cpu", card):
        value = values.to(device)
        weight, remainder = torch.empty_like(value, dtype=torch.bfloat16), torch.empty_like(value, dtype=torch.int16)
        marked, back, spare = torch.ones_like(value), torch.empty_like(value), torch.empty_like(value).view(torch.int32)
        split(value, weight, remainder, marked, spare)
        halves = [weight.cpu(), remainder.cpu(), marked.cpu().clone()]
        join(weight, remainder, marked, back, spare)
        bits = noise(((300, 7, 1000), (500, 100, 1)), 1000, 140_000, 12345, torch.tensor(9.0), value.device)
        rounded = torch.empty(139_000, dtype=torch.bfloat16, device=device)
        round_stochastically(value[:139_000], bits[0].clone(), rounded)
        found[device] = [*halves, back.cpu(), *(part.cpu() for part in bits), rounded.cpu()]
    assert torch.equal(found[card][3], values) and (found[card][2] < 0).any()
    for place, (ours, theirs) in enumerate(zip(found[card], found["cpu"], strict=True)):
        assert torch.equal(ours, theirs), place


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_masters_are_the_cpus_but_for_rounding(card: str, moments: str, capfd: pytest.CaptureFixture[str]) -> None:
    found = {}
    for device in ("cpu", card):
        weights = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((70, 51), (300,))]
        parameters = [nn.Parameter((weight * 0.02).bfloat16().to(device)) for weight in weights]
        optimizer = AdamWBF16(parameters, lr=1e-5, weight_decay=0.1, moments=moments)
        for step in range(5):
            for parameter in parameters:
                generator = torch.Generator().manual_seed(step)
                parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16().to(device)
            optimizer.step()
        found[device] = [master.cpu() for _, master in optimizer.masters()]
    for ours, theirs in zip(found[card], found["cpu"], strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
    assert "fall back to run on the CPU" not in "".join(capfd.readouterr())
