"""The card itself. Catches a card that is not seen, remembers wrongly, or counts nothing."""

from __future__ import annotations

import torch

from lightning_npu_tp.estimates.flops import peak_flops


def test_the_card_is_there_and_has_a_name_and_memory(card, runtime):
    assert runtime.is_available() and runtime.device_count() >= 1
    assert runtime.get_device_name(0)
    free, total = runtime.mem_get_info(0)
    assert 0 < free <= total


def test_what_is_copied_there_and_back_is_the_same(card):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool):
        sent = torch.randint(0, 2, (1025, 7)).to(dtype)
        assert torch.equal(sent.to(card).cpu(), sent)
        assert torch.equal(sent.pin_memory().to(card, non_blocking=True).cpu(), sent)


def test_memory_is_counted_and_given_back(card, runtime):
    runtime.empty_cache()
    before = runtime.memory_allocated(0)
    held = torch.empty(64 * 2**20, dtype=torch.uint8, device=f"{card}:0")
    assert runtime.memory_allocated(0) - before >= 64 * 2**20
    assert runtime.memory_stats(0)["allocated_bytes.all.peak"] >= before + 64 * 2**20
    del held
    assert runtime.memory_allocated(0) == before
    reserved = runtime.memory_reserved(0)
    runtime.empty_cache()
    assert runtime.memory_reserved(0) < reserved


def test_random_numbers_repeat_from_a_seed_and_from_a_state(card, runtime):
    runtime.manual_seed(3)
    first = torch.rand(5, device=card)
    state = runtime.get_rng_state(0)
    second = torch.rand(5, device=card)
    runtime.set_rng_state(state, 0)
    assert torch.equal(torch.rand(5, device=card), second) and not torch.equal(first, second)
    runtime.manual_seed(3)
    assert torch.equal(torch.rand(5, device=card), first)


def test_the_cards_peak_is_known_for_mfu(card, runtime):
    name = runtime.get_device_name(0)
    assert peak_flops(name), f"flops.py knows no peak of {name!r}; train/mfu is not logged"


def test_the_accelerator_binds_a_device_and_tells_its_memory(card, runtime):
    if card != "npu":
        return
    from lightning_npu_tp.trainer.accelerator import NPUAccelerator

    accelerator = NPUAccelerator()
    last = runtime.device_count() - 1
    accelerator.setup_device(torch.device(card, last))
    assert torch.ones(1, device=card).device.index == runtime.current_device() == last
    accelerator.setup_device(torch.device(card, 0))
    held = torch.empty(2**20, dtype=torch.uint8, device=card)
    assert accelerator.get_device_stats(torch.device(card, 0))["allocated_bytes.all.current"] >= held.numel()
    accelerator.teardown()
