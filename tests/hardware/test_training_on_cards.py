"""A Trainer's steps on one card and on several, against the CPU; checkpoints; memory that does not suffice.

Catches kernels, collectives, clipping or an optimizer that train something else there, a step that waits for the
host, a checkpoint that does not come back on the card or off it, and an out-of-memory error that explains nothing.
"""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from cards import FLOAT32, LOSSES, Fit, distance, fit

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.tools.prove import prove, widest
from lightning_npu_tp.tools.testing.models import tiny_deepseek_v2_config

# torch_npu's own deepcopy of a tensor asks torch for what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")


@pytest.fixture(scope="module")
def on_the_cpu(on_ranks: Any) -> Fit:
    (result,) = on_ranks(alone, 1, "cpu", backend=None, timeout=120)
    return result


def alone(rank: int, world_size: int, device_type: str, options: dict[str, Any] | None = None) -> Fit:
    return fit(rank, world_size, device_type, **(options or {}))


def same(got: Fit, wanted: Fit) -> None:
    assert len(got.losses) == len(wanted.losses) == 3
    pairs = zip([*got.losses, got.val_loss], [*wanted.losses, wanted.val_loss], strict=True)
    assert all(abs(a - b) <= LOSSES * b for a, b in pairs), (got, wanted)


def test_one_card_trains_as_the_cpu_and_never_waits_for_the_host(card, on_ranks, on_the_cpu):
    (result,) = on_ranks(alone, 1, card, backend=None, timeout=120)
    same(result, on_the_cpu)
    assert not result.sightings


def test_tensor_ranks_train_as_the_cpu_and_never_wait_for_the_host(card, several, on_ranks, on_the_cpu):
    for result in on_ranks(alone, several, card, {"sequence_parallel": True}, backend=None, timeout=180):
        same(result, on_the_cpu)
        assert not result.sightings


def test_travelling_rows_train_as_the_cpu_and_wait_once_per_mixture_layer(card, several, on_ranks, on_the_cpu):
    options = {"data_parallel_size": several, "expert_parallel_size": several, "sequences": 4 // several}
    for result in on_ranks(alone, several, card, options, backend=None, timeout=180):
        same(result, on_the_cpu)
        # Two mixture layers, two of the three steps are counted.
        assert len(result.sightings) == 4 and all("_exchange_counts" in text for text in result.sightings)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_sixteen_bits_train_as_float32_but_for_their_rounding(card, on_ranks, on_the_cpu, precision):
    (result,) = on_ranks(alone, 1, card, {"trainer": {"precision": precision}}, backend=None, timeout=120)
    # Eight bits of mantissa; the scaler may leave steps out, so only the first loss is that of the same weights.
    assert abs(result.losses[0] - on_the_cpu.losses[0]) <= 2**-8 * on_the_cpu.losses[0]


def resumed(rank: int, world_size: int, device_type: str, folder: str) -> tuple[Fit, Fit]:
    """Three steps at once, with a checkpoint after two, and the third once more from it."""
    path = f"{folder}/two.ckpt"
    at_once = fit(rank, world_size, device_type, save=path, weights=True)
    return at_once, fit(rank, world_size, device_type, resume=path, weights=True)


def from_checkpoint(rank: int, world_size: int, device_type: str, path: str) -> Fit:
    return fit(rank, world_size, device_type, resume=path, weights=True)


def test_a_checkpoint_goes_on_where_it_was_on_the_card_and_on_the_cpu(card, on_ranks, tmp_path):
    ((at_once, again),) = on_ranks(resumed, 1, card, str(tmp_path), backend=None, timeout=180)
    assert again.losses == at_once.losses[2:]
    assert all(torch.equal(value, again.weights[name]) for name, value in at_once.weights.items())
    (there,) = on_ranks(from_checkpoint, 1, "cpu", str(tmp_path / "two.ckpt"), backend=None, timeout=120)
    assert max(distance(value, at_once.weights[name]) for name, value in there.weights.items()) <= FLOAT32


def out_of_memory(rank: int, world_size: int, device_type: str) -> str:
    """The error of a run whose process may take a thousandth of the card."""
    from lightning_npu_tp.devices.device import torch_module

    module: Any = torch_module(device_type)
    module.set_per_process_memory_fraction(8 * 2**20 / module.mem_get_info(0)[1], 0)
    try:
        fit(rank, world_size, device_type)
    except Exception as error:
        return "".join(traceback.format_exception_only(error))
    finally:
        module.set_per_process_memory_fraction(1.0, 0)
    return ""


def test_memory_that_does_not_suffice_is_explained(card, on_ranks):
    (text,) = on_ranks(out_of_memory, 1, card, backend=None, timeout=120)
    assert text.startswith("torch.OutOfMemoryError: ") and "This rank held: weights" in text, text


def test_one_card_is_proven(card: str, on_ranks: Any) -> None:
    """Gradients and three steps against transformers: to float64's last digits on CUDA, in float32 on an Ascend."""
    proof = prove(tiny_deepseek_v2_config(), Layout(1, 1, 1), dtype=widest(card), device=card, run=on_ranks)
    assert not proof.failed and 0 < proof.worst.difference, proof.headline()


def test_a_layout_on_several_cards_is_proven(card: str, several: int, on_ranks: Any) -> None:
    layout, options = Layout(several // 2, 2, several), Options(sequence_parallel=True)
    proof = prove(tiny_deepseek_v2_config(), layout, options, dtype=widest(card), device=card, run=on_ranks)
    assert not proof.failed and 0 < proof.worst.difference, proof.headline()
