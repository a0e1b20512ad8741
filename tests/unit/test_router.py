"""Catches a router that picks or weighs experts differently from the checkpoint's authors, that rounds its
logits to the model's precision, or whose gradient misses a way.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.moe.router import TopKRouter, limit_to_groups
from lightning_npu_tp.testing.operators import CountOperators
from lightning_npu_tp.testing.reference import assert_close_relative, float64_reference

SETTINGS = {
    "greedy": {"topk_method": "greedy"},
    "greedy, scaled": {"topk_method": "greedy", "routed_scaling_factor": 16.0},
    "groups": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
    "all groups": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 2},
    # Three picks, but the one group allowed has two experts: the third has weight zero.
    "more picks than allowed experts": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1},
}


def router(**settings) -> TopKRouter:
    if "n_group" in settings:
        settings["num_groups"] = settings.pop("n_group")
    return TopKRouter(hidden_size=16, num_experts=8, **{"top_k": 3, **settings})


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_picks_weights_and_gradients_equal_transformers(settings):
    with float64_reference():
        reference = DeepseekV2TopkRouter(
            DeepseekV2Config(
                hidden_size=16, num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=3, **settings
            )
        )
        torch.nn.init.normal_(reference.weight)
        x = torch.randn(9, 16, requires_grad=True)
        _, weights, experts = reference(x)
        dense = torch.zeros(9, 8).scatter(1, experts, weights)
        dense.square().sum().backward()
    ours = router(**settings).double()
    ours.weight.data.copy_(reference.weight)
    y = x.detach().clone().requires_grad_()
    routing = ours(y)
    dense_ours = torch.zeros(9, 8, dtype=torch.float64).scatter(1, routing.experts_TK, routing.weights_TK)
    dense_ours.square().sum().backward()
    assert routing.weights_TK.dtype == routing.scores_TE.dtype == torch.float64
    assert_close_relative(dense_ours, dense, 1e-14, "weights by expert")
    assert_close_relative(y.grad, x.grad, 1e-13, "token gradient")
    assert_close_relative(ours.weight.grad, reference.weight.grad, 1e-13, "weight gradient")


def test_normalised_weights_sum_to_one_and_are_not_scaled():
    ours = router(norm_topk_prob=True, routed_scaling_factor=16.0)
    torch.nn.init.normal_(ours.weight)
    routing = ours(torch.randn(5, 16))
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.ones(5))
    picked = routing.scores_TE.gather(1, routing.experts_TK)
    torch.testing.assert_close(routing.weights_TK, picked / picked.sum(1, keepdim=True))


def test_a_single_pick_is_scaled_and_not_normalised():
    ours = router(norm_topk_prob=True, routed_scaling_factor=2.0, top_k=1)
    torch.nn.init.normal_(ours.weight)
    routing = ours(torch.randn(5, 16))
    torch.testing.assert_close(routing.weights_TK[:, 0], 2.0 * routing.scores_TE.amax(1))


def test_scores_are_those_before_groups_were_excluded():
    ours = router(topk_method="group_limited_greedy", num_groups=4, topk_group=1, top_k=2)
    scores = ours(torch.randn(5, 16)).scores_TE
    torch.testing.assert_close(scores.sum(1), torch.ones(5))


def test_groups_are_ranked_by_their_best_expert():
    scores = torch.tensor([[0.30, 0.01, 0.20, 0.19, 0.05, 0.04, 0.11, 0.10]])
    limited = limit_to_groups(scores, num_groups=4, topk_group=2)
    # By sums the second group would come before the first.
    assert limited.tolist() == [[*scores[0, :4].tolist(), 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_computed_in_float32_whatever_the_models_precision(autocast):
    ours = router()
    x = torch.randn(5, 16)
    if not autocast:
        ours, x = ours.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        routing = ours(x)
    exact = torch.softmax(x.double() @ ours.weight.double().t(), dim=1)
    assert routing.weights_TK.dtype == torch.float32
    # In bfloat16 the difference would be 1e-3.
    assert_close_relative(routing.scores_TE, exact, 1e-6, "scores")


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_routing_reads_nothing_on_the_host(settings):
    ours, x = router(**settings), torch.randn(5, 16, requires_grad=True)
    with CountOperators() as operators:
        ours(x).weights_TK.sum().backward()
    assert not operators.found()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"top_k": 9}, ["top_k=9", "8"]),
        ({"top_k": 0}, ["top_k=0"]),
        ({"topk_method": "noaux_tc"}, ["noaux_tc", "greedy", "group_limited_greedy"]),
        ({"topk_method": "group_limited_greedy", "num_groups": 3}, ["num_groups=3", "[1, 2, 4, 8]"]),
        ({"topk_method": "group_limited_greedy", "num_groups": 4, "topk_group": 5}, ["topk_group=5", "num_groups=4"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ConfigError) as raised:
        router(**settings)
    assert all(word in str(raised.value) for word in words)
