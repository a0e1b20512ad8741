"""Simulated cards that compute in float64: the real torch_npu, its groups and the fused kernels, against one process.

Catches what rounding hides elsewhere: a gradient that is off by 1e-6, a sum that leaves out a small part, a kernel or
a cast that falls back to float32 on the way. Such cards differ from the other tests', and have ranks of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_train
import torch
import torch.distributed as dist
from fused import ALL, Seen, distance
from test_kernels_npu_models import converted, train
from transformers import AutoModelForCausalLM

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.kernels import npu_limits
from lightning_npu_tp.models.families.registry import FAMILIES
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.tools import check_ranks
from lightning_npu_tp.tools.prove import prove
from lightning_npu_tp.tools.testing.models import (
    random_batch,
    reference_model,
    tiny_config,
    tiny_deepseek_v2_grouped_config,
)
from lightning_npu_tp.tools.testing.ranks import RankPool

# torch_npu's own deepcopy of a tensor asks torch for what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
# Some thousand additions in another order.
FLOAT64 = 1e-12
SETTINGS = {"ASCEND_SIM_FLOAT64": "1", "ASCEND_SIM_SOC": "Ascend950PR_9599"}


def nothing(rank: int, world_size: int) -> None:
    pass


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Four processes that are kept; they take the settings when they start."""
    with RankPool(4) as pool:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in SETTINGS.items():
                patch.setenv(name, value)
            pool.run(nothing)
        yield pool


@pytest.fixture
def cards(pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """`run_ranks` on four such cards, and a parent that takes its own for the same."""
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    return lambda fn, world_size, *args, **how: pool.run(fn, *args, **how)


def casts_and_sums(rank: int, world_size: int) -> None:
    torch.npu.set_device(rank)
    third = torch.ones(3, device="npu").double() / 3
    for value in (third, third.float().to(torch.float64), third.to("cpu").npu(), third.float().type(torch.float64)):
        assert value.dtype == torch.float64
    assert third.cpu()[0] == 1 / 3 and third.half().dtype == torch.float16
    dist.init_process_group("cpu:gloo,npu:hccl")
    tiny = torch.tensor([1.0, 2.0**-40], dtype=torch.float64, device="npu") * (rank + 1)
    dist.all_reduce(tiny)
    assert tiny.tolist() == [10.0, 10 * 2.0**-40]
    share = torch.empty(1, dtype=torch.float64, device="npu")
    dist.reduce_scatter_tensor(share, torch.arange(4, dtype=torch.float64, device="npu") + 2.0**-40)
    assert share.item() == 4 * rank + 4 * 2.0**-40
    large = torch.tensor([2**61 + rank], dtype=torch.uint64, device="npu")
    dist.all_reduce(large)
    assert large.item() == 2**63 + 6
    dist.destroy_process_group()


def test_casts_and_collectives_keep_float64(cards) -> None:
    cards(casts_and_sums, 4, backend=None)


def gradients(rank: int, world_size: int) -> dict[str, tuple[float, set[str], set[Any]]]:
    """Of this rank's share of the families: the worst gradient, the fused operators that ran, the fallbacks."""
    torch.npu.set_device(rank)
    dist.init_process_group("cpu:gloo,npu:hccl", store=dist.HashStore(), rank=0, world_size=1)
    found = {}
    for family in [family.name for family in FAMILIES][rank::world_size]:
        config = tiny_config(family)
        model, batch = reference_model(config), random_batch(config, 2, 12, seed=0, padding=True)
        _, wanted = train(converted(model, "cpu"), "cpu", batch)
        npu_limits.forget()
        with Seen() as seen:
            _, got = train(converted(model, "npu"), "npu", batch)
        assert got.keys() == wanted.keys()
        assert all(gradient.dtype == torch.float64 for gradient in got.values())
        worst = max(distance(gradient, wanted[name]) for name, gradient in got.items())
        found[family] = (worst, seen.names, npu_limits._said.copy())
    dist.destroy_process_group()
    return found


def test_gradients_of_every_family_with_fused_kernels_are_the_cpus(cards) -> None:
    found = {
        family: answer for part in cards(gradients, 4, backend=None, timeout=200) for family, answer in part.items()
    }
    assert found.keys() == {family.name for family in FAMILIES}
    for family, (worst, operators, fallbacks) in found.items():
        assert worst <= FLOAT64, family
        assert not fallbacks, family
        assert {"npu_rms_norm", "npu_rotary_mul", "npu_fusion_attention"} <= operators, family
    assert found["deepseek_v2"][1] >= ALL


# Of four tensor ranks the default job below has two.
LAYOUTS = {
    "data 2, tensor 2, slices": (Layout(2, 2, 4), Options(sequence_parallel=True, recompute="block")),
    "data 2, tensor 2, replicas": (Layout(2, 2, 2), Options(data_parallel="replicate", dispatch="all_to_all")),
    "data 4": (Layout(4, 1, 2), Options(recompute="moe")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_on_cards_is_proven_as_closely_as_on_the_cpu(cards, name) -> None:
    """Loss, logits, norm, counts, each gradient, three steps of AdamW, and a checkpoint into another layout."""
    proof = prove(tiny_deepseek_v2_grouped_config(num_attention_heads=4), *LAYOUTS[name], device="npu", run=cards)
    print(proof.headline())
    assert not proof.failed and 0 < proof.worst.difference <= FLOAT64
    assert proof.as_json()["device"] == "npu" and proof.dtype == "float64"


def test_a_lost_collective_is_seen_on_cards(cards) -> None:
    config, rule = tiny_deepseek_v2_grouped_config(num_attention_heads=4), "*.self_attn.o_proj.weight"
    proof = prove(config, Layout(1, 4, 4), device="npu", steps=1, broken=rule, run=cards)
    assert rule in {check.name for check in proof.failed}


def test_cards_as_they_are_prove_nothing_in_float64() -> None:
    with pytest.raises(ConfigError, match="--dtype float64 cannot be computed on npu. Use --dtype float32"):
        prove(tiny_deepseek_v2_grouped_config(), Layout(1, 2, 2), device="npu")


def test_a_folder_is_checked_on_cards_in_float64(cards, on_ranks, tmp_path) -> None:
    config = tiny_deepseek_v2_grouped_config(num_attention_heads=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    request = check_ranks.Request(
        folder=str(tmp_path),
        config=config,
        layout=Layout(2, 2, 4),
        options=Options(),
        device_type="npu",
        dtype="float64",
        batch=random_batch(config, 4, 12, seed=0),
        timeout=120.0,
    )
    answers = cards(check_ranks.run_rank, 4, request, backend=None, timeout=120)
    (alone,) = on_ranks(check_ranks.run_alone, 1, request, 1, True, backend=None, timeout=120)
    differences = check_ranks.compare(answers, alone)
    assert differences.keys() == {"loss", "gradient norm", "logits"}
    assert max(differences.values()) <= FLOAT64, differences


@pytest.fixture(scope="module")
def on_the_cpu(on_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpu64") / "run"
    on_ranks(test_train.job, 1, str(folder), {"trainer.precision": "64-true"}, backend=None, timeout=120)
    return folder


JOBS = ("tensor 4", "tensor 4, slices, reference kernels", "data 4, experts 2, reference kernels, recompute")


@pytest.mark.parametrize("name", JOBS)
def test_the_default_job_on_cards_has_the_numbers_of_one_process(cards, on_the_cpu, tmp_path, name) -> None:
    overrides = {**test_train.ON_FOUR, **test_train.LAYOUTS[name], "trainer.precision": "64-true"}
    cards(test_train.job, 4, str(tmp_path / "run"), overrides, backend=None, timeout=400)
    for column in ("train/loss", "train/grad_norm", "val/loss"):
        got, wanted = (test_train.column(folder, column) for folder in (tmp_path / "run", on_the_cpu))
        assert test_train.apart(got, wanted) <= FLOAT64, column
