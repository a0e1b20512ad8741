"""Operations per token and peaks. Catches a forgotten matmul (latents, shared experts, router, head), inactive experts
counted, a family whose config names a size otherwise, and a card taken for another one.

Compared exactly with what torch counts in transformers' own models.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from lightning_npu_tp.estimates.flops import forward_flops_per_token, peak_flops, training_flops_per_token
from lightning_npu_tp.models.families.registry import supported
from lightning_npu_tp.tools.testing.models import (
    random_batch,
    reference_model,
    tiny_config,
    tiny_deepseek_v2_grouped_config,
)

BATCH, LENGTH = 2, 24
CONFIGS = {name: lambda name=name: tiny_config(name) for name in supported()}
CONFIGS["deepseek_v2, query latent"] = tiny_deepseek_v2_grouped_config
LITE = Path(__file__).parents[3] / "conf/model/deepseek_v2_lite.yaml"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_needs_the_operations_that_torch_counts(name: str) -> None:
    config = CONFIGS[name]()
    model = reference_model(config)
    batch = random_batch(config, BATCH, LENGTH, seed=0)
    with FlopCounterMode(display=False) as counter:
        loss = model(**batch).loss
        forward = counter.get_total_flops()
        loss.backward()
    tokens = BATCH * LENGTH
    assert forward == tokens * forward_flops_per_token(config, LENGTH)
    assert counter.get_total_flops() == tokens * training_flops_per_token(config, LENGTH)


def test_a_causal_count_leaves_out_half_of_the_scores_and_nothing_else() -> None:
    config = tiny_config("deepseek_v2")
    whole, half = (forward_flops_per_token(config, LENGTH, causal=causal) for causal in (False, True))
    # Layers, heads, key and value sizes of the tiny model.
    assert whole - half == 2 * 3 * 8 * (16 + 12) * (LENGTH - 1) / 2


def test_v2_lite_trains_at_six_operations_per_active_parameter_and_token() -> None:
    node = yaml.safe_load(LITE.read_text())
    config = AutoConfig.for_model(node["architecture"], **node["config"])
    # 15,706,484,224 parameters without the idle experts (58 of 64), the embedding and the norms: no matmuls.
    idle, norms = 26 * 58 * 3 * 2048 * 1408, 27 * (2 * 2048 + 512) + 2048
    active = 15_706_484_224 - idle - 102400 * 2048 - norms
    assert training_flops_per_token(config, 0) == 6 * active


def test_a_card_is_known_by_its_whole_name() -> None:
    assert peak_flops("Ascend910B3") == 294.91e12
    assert peak_flops("Ascend910B4-1") == peak_flops("Ascend910B4") == 245.76e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 311.9e12
    assert peak_flops("NVIDIA A10") == 125e12
    assert [peak_flops(name) for name in ("NVIDIA A100X", "Ascend910B33", "Ascend310P3", "")] == [None] * 4
