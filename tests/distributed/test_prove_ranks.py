"""Catches a proof that proves nothing: a sharding rule whose collective could be dropped without anybody noticing,
a broken rule that fails without being named, a layout that is reported as right without having run.

Every rule of the DeepSeek-V2 plan is broken once on two ranks.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.models.layers import sharded_causal_lm
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.tools import prove as proving
from lightning_npu_tp.tools.cli import app
from lightning_npu_tp.tools.proof_batches import KINDS
from lightning_npu_tp.tools.prove import Problem, examine, prove, run_rank
from lightning_npu_tp.tools.small_model import shrink
from lightning_npu_tp.tools.testing.models import tiny_config, tiny_deepseek_v2_config, tiny_deepseek_v2_grouped_config
from lightning_npu_tp.tools.testing.sharded import Training

TWO = Layout(1, 2, 2)
WHOLE, SLICES = Options(), Options(sequence_parallel=True)
BIASES = {"attention_bias": True, "mlp_bias": True}
CONFIGS = {
    "direct queries": tiny_deepseek_v2_config(**BIASES),
    "query latent": tiny_deepseek_v2_grouped_config(**BIASES),
}
# With slices of the sequence these differ from one process in their own gradient and in no other.
ALONE = ("model.norm.weight", "*.self_attn.o_proj.bias", "*.mlp.down_proj.bias")


@pytest.fixture(scope="module", params=CONFIGS)
def problem(request: pytest.FixtureRequest) -> Problem:
    small = shrink(CONFIGS[request.param], TWO)
    small.num_hidden_layers = 2
    return Problem.of(small, TWO, steps=1)


def run_each(rank: int, world_size: int, training: Training, options: Options, rules: list[str | None]) -> list[Any]:
    """Break one rule after another in the same processes, which is much faster than a start for each."""
    return [run_rank(rank, world_size, training, TWO, options, "float64", [], rule) for rule in rules]


def _break_each(on_ranks: Any, problem: Problem, options: Options, rules: list[str]) -> list[str]:
    """The rules that have a collective in this layout; fails where dropping it is not caught, or not named."""
    broken: list[str | None] = [None, *rules]
    results = on_ranks(run_each, 2, problem.training, options, broken, timeout=180)
    answers = {rule: [rank[index] for rank in results] for index, rule in enumerate(broken)}
    assert not examine(problem, TWO, options, run=lambda *_, **__: answers[None]).failed
    caught = []
    for rule in rules:
        try:
            proof = examine(problem, TWO, options, broken=rule, run=lambda *_, **__: answers[rule])
        except ConfigError as error:
            assert "no collective" in str(error) and rule in str(error)
            continue
        named = {check.name: check.worst.where for check in proof.failed}
        assert rule in named, f"{rule} lost {proof.left_out} collectives, and only {sorted(named)} fail"
        assert problem.plan.patterns[named[rule]] == rule
        if options is SLICES and rule in ALONE:
            wrong = [check.name for check in proof.checks if check.after and check.gradient.difference > proof.bound]
            assert wrong == [rule]
        caught.append(rule)
    return caught


def test_every_rule_that_loses_its_collective_is_caught_and_named(on_ranks: Any, problem: Problem) -> None:
    rules = list(dict.fromkeys(problem.plan.patterns.values()))
    caught = _break_each(on_ranks, problem, WHOLE, rules)
    left = [rule for rule in rules if rule not in caught]
    assert set(left) == set(ALONE), "which rules need no collective on whole activations has changed"
    # Norms and router need another collective when they see a slice only.
    others = [*left, "*layernorm.weight", "*.mlp.gate.weight", "*.self_attn.kv_a_proj_with_mqa.bias"]
    assert _break_each(on_ranks, problem, SLICES, others) == others


# What to break -> the kinds of batch that find it.
BREAKS = {
    "attention without a mask sees the future": {"no mask", "balance losses"},
    "padding is taken to be on the right": {"left padding"},
    "documents see each other": {"packed documents"},
    "there is always a mask": {"no mask", "balance losses"},
}


def run_broken(rank: int, world_size: int, training: Training, what: str) -> Any:
    attend, build = F.scaled_dot_product_attention, sharded_causal_lm.attention_mask_4d

    def sees_the_future(*tensors: Tensor, is_causal: bool, **settings: Any) -> Tensor:
        return attend(*tensors, **settings)

    def mask(attention_mask: Tensor | None, position_ids: Tensor | None, **sizes: Any) -> Tensor | None:
        if what == "padding is taken to be on the right" and attention_mask is not None:
            attention_mask = attention_mask.sort(dim=1, descending=True).values
        if what == "documents see each other":
            position_ids = None
        found = build(attention_mask, position_ids, **sizes)
        if what == "there is always a mask" and found is None:
            # The numbers are right, but nobody asked the kernel for them.
            found = torch.ones(sizes["query_length"], sizes["query_length"], dtype=torch.bool).tril()[None, None]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_causal_lm, "attention_mask_4d", mask)
        if what == "attention without a mask sees the future":
            patch.setattr(F, "scaled_dot_product_attention", sees_the_future)
        return run_rank(rank, world_size, training, TWO, WHOLE, "float64", [], None)


def test_every_kind_of_batch_takes_its_own_path_and_finds_what_breaks_there(on_ranks: Any) -> None:
    problem = Problem.of(shrink(tiny_deepseek_v2_config(), TWO), TWO, steps=1)
    for what, finds in BREAKS.items():
        results = on_ranks(run_broken, 2, problem.training, what, timeout=90)
        proof = examine(problem, TWO, WHOLE, run=lambda *_, results=results, **__: results)
        assert {check.name for check in proof.failed} & KINDS.keys() == finds, what
        if what == "there is always a mask":
            never = next(check.gradient for check in proof.checks if check.name == "no mask")
            assert never.difference == math.inf and "masked instead of causal" in never.where
            assert {check.name for check in proof.failed} == finds
            # Nor did these ranks slice or recompute.
            asked = Options(sequence_parallel=True, recompute="block")
            proof = examine(problem, TWO, asked, run=lambda *_, results=results, **__: results)
            (padded,) = [check for check in proof.failed if check.name == "right padding"]
            assert "masked instead of masked, recomputed, sliced" in padded.gradient.where


def test_exchanged_rows_need_the_sum_of_the_tensor_ranks(on_ranks: Any) -> None:
    problem = Problem.of(shrink(CONFIGS["direct queries"], TWO), TWO, steps=1)
    options = Options(dispatch="all_to_all")
    rules = ["*.mlp.experts.down_proj", "*.mlp.shared_experts.down_proj.weight"]
    assert _break_each(on_ranks, problem, options, rules) == rules


@pytest.mark.parametrize("layout", [Layout(1, 2, 2), Layout(2, 1, 2)])
def test_a_checkpoint_comes_back_in_another_layout(on_ranks: Any, layout: Layout) -> None:
    problem = Problem.of(shrink(CONFIGS["direct queries"], layout), layout, steps=1, reshard=True)
    results = on_ranks(run_rank, 2, problem.training, layout, WHOLE, "float64", [], None, timeout=90)
    proof = examine(problem, layout, WHOLE, run=lambda *_, **__: results)
    (row,) = [check for check in proof.checks if check.name == "save, reshard, load"]
    assert not proof.failed and row.gradient.difference == 0.0
    # What comes back otherwise is seen.
    results[1][0].resharded = (0.5, "exp_avg of something")
    broken = examine(problem, layout, WHOLE, run=lambda *_, **__: results)
    assert [check.name for check in broken.failed] == ["save, reshard, load"]


def test_a_norm_over_all_heads_needs_its_sum(on_ranks: Any) -> None:
    problem = Problem.of(shrink(tiny_config("olmoe"), TWO), TWO, steps=1)
    rules = ["*.self_attn.q_norm.weight", "*.self_attn.k_norm.weight"]
    assert _break_each(on_ranks, problem, WHOLE, rules) == rules


def test_float32_is_held_to_its_own_bound(on_ranks: Any) -> None:
    problem = Problem.of(shrink(CONFIGS["direct queries"], TWO), TWO, steps=1)
    results = on_ranks(run_rank, 2, problem.training, TWO, SLICES, "float32", [], None, timeout=90)
    proof = examine(problem, TWO, SLICES, dtype="float32", run=lambda *_, **__: results)
    assert not proof.failed and 1e-9 < proof.worst.difference < proof.bound


def test_layouts_over_data_ranks_are_proven(on_ranks: Any) -> None:
    layout = Layout(2, 1, 2)
    proof = prove(CONFIGS["query latent"], layout, run=on_ranks)
    print(proof.headline())
    assert not proof.failed and proof.worst.difference > 0
    assert "the layout computes what one process computes" in proof.headline()
    with pytest.raises(ConfigError, match="more than one tensor rank"):
        prove(CONFIGS["query latent"], layout, steps=1, broken="lm_head.weight", run=on_ranks)


@pytest.mark.parametrize("broken", [None, "*.self_attn.o_proj.weight"])
def test_the_command_prints_a_row_per_rule_and_ends_with_the_verdict(
    on_ranks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str | None
) -> None:
    def prove_on_ranks(*args: Any, **kwargs: Any) -> Any:
        return prove(*args, **kwargs, steps=1, run=on_ranks)

    monkeypatch.setattr(proving, "prove", prove_on_ranks)
    CONFIGS["direct queries"].save_pretrained(tmp_path)
    arguments = ["prove", "--model", str(tmp_path), "--tensor", "2", "--json", str(tmp_path / "proof.json")]
    result = CliRunner().invoke(app, [*arguments, *(["--break", broken] if broken else [])])
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert result.exit_code == (1 if broken else 0), result.output
    assert proof["passed"] is (broken is None) and proof["headline"] in result.output
    rows = {check["name"]: check for check in proof["checks"]}
    assert rows.keys() >= KINDS.keys()
    assert {"loss", "logits", "clip norm", "expert counts", "lm_head.weight"} <= rows.keys()
    assert all(name in result.output for name in rows)
    if broken:
        assert not rows[broken]["passed"] and "o_proj" in rows[broken]["gradient"]["where"]
        assert "FAIL" in result.output
