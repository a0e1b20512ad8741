"""Every family computes on any layout what transformers computes in one process, in float64.

Catches a rule of a plan that splits the wrong way, a norm of queries or keys whose gradient stays partial,
a rotation of the wrong pairs, a router that weighs otherwise: loss, logits, gradients, clip norm and the
parameters after three AdamW steps are compared. DeepSeek-V2 has tests of its own (test_parity.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.tools.testing.models import ReferenceStep, random_batch, tiny_config
from lightning_npu_tp.tools.testing.sharded import Training, compare, train_alone, train_sharded

# Double rounding over a few thousand additions per element; a real mistake is 1e-3 and more.
TOLERANCE = 1e-10
CLIP_NORM = 0.05

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 160}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# Name -> family, what its config has beyond the tiny one's.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "olmoe": ("olmoe", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    "llama_settings": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
    "qwen3_biases": ("qwen3", {"attention_bias": True, "rope_parameters": YARN}),
    "mixtral_padded": ("mixtral", {}),
    "qwen3_moe_settings": ("qwen3_moe", {"attention_bias": True, "norm_topk_prob": False, "decoder_sparse_step": 1}),
    "qwen2_moe_no_bias": ("qwen2_moe", {"qkv_bias": False, "norm_topk_prob": True, "mlp_only_layers": []}),
    "olmoe_settings": (
        "olmoe",
        {"clip_qkv": 0.3, "attention_bias": True, "norm_topk_prob": True, "num_key_value_heads": 8, "pad_token_id": 1},
    ),
    "deepseek_v3_halves": ("deepseek_v3", {"rope_interleave": False}),
    "deepseek_v3_plain": ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True, "rope_parameters": None}),
    # No number of ranks divides 5 sequences, 17 positions or 131 vocabulary entries.
    "uneven": ("qwen2_moe", {"vocab_size": 131}),
}


@cache
def _training(name: str) -> Training:
    family, overrides = CASES[name]
    config = tiny_config(family, **overrides)
    shape = (5, 17) if name == "uneven" else (2, 8)
    # A mask comes in by another way than its absence; each family has both.
    batch = random_batch(config, *shape, seed=0, padding=name != family)
    return Training(config=config, batches=[batch], clip_norm=CLIP_NORM)


@cache
def _expected(name: str) -> ReferenceStep:
    training = _training(name)
    expected = train_alone(training)
    assert expected.grad_norm > CLIP_NORM, "the case must clip"
    return expected


def _check(on_ranks: Any, name: str, sizes: tuple[int, int, int], options: Options) -> None:
    training, layout = _training(name), Layout(*sizes)
    differences: dict[str, float] = {}
    for rank, run in enumerate(on_ranks(train_sharded, layout.world, training, layout, options, timeout=120)):
        found = compare(run, _expected(name), training)
        differences |= {f"rank {rank} {what}": difference for what, difference in found.items()}
    worst = max(differences, key=differences.__getitem__)
    print(f"{name} {sizes} {options.sequence_parallel}: worst {differences[worst]:.2e} ({worst})")
    assert differences[worst] <= TOLERANCE, f"{worst}: {differences[worst]:.3e}"


LAYOUTS = [(1, 2, 2), (1, 4, 4), (2, 1, 2), (4, 1, 4), (4, 1, 2), (2, 2, 2), (2, 2, 4)]
# Further settings change what tensor ranks do; data ranks only tie weights in another way.
RUNS = [
    pytest.param(name, sizes, sliced, id=f"{name}-{'x'.join(map(str, sizes))}{'-sliced' if sliced else ''}")
    for name, (family, _) in CASES.items()
    for sizes in LAYOUTS
    # One tensor rank has nothing to slice.
    for sliced in ([False, True] if sizes[1] > 1 else [False])
    if sizes == (1, 2, 2) or name in (family, "uneven", "llama_settings")
]


@pytest.mark.parametrize(("name", "sizes", "sequence_parallel"), RUNS)
def test_every_family_in_every_layout_equals_transformers(
    on_ranks: Any, name: str, sizes: tuple[int, int, int], sequence_parallel: bool
) -> None:
    _check(on_ranks, name, sizes, Options(sequence_parallel=sequence_parallel))
