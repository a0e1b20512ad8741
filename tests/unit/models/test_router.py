"""Catches a router that picks or weighs experts differently from the checkpoint's authors, that rounds its
logits or its bias to the model's precision, whose gradient misses a way, or whose bias reaches the weights.
"""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.models.moe.router import TopKRouter, limit_to_groups
from lightning_npu_tp.tools.testing.operators import CountOperators
from lightning_npu_tp.tools.testing.reference import assert_close_relative, float64_reference

SETTINGS = {
    "greedy": {"topk_method": "greedy"},
    "greedy, scaled": {"topk_method": "greedy", "routed_scaling_factor": 16.0},
    "groups": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
    "all groups": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 2},
    # Three picks, but the one group allowed has two experts: the third has weight zero.
    "more picks than allowed experts": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1},
}

V3 = {"topk_method": "noaux_tc", "scoring": "sigmoid", "normalisation": "v3"}
V3_GROUPS = {"n_group": 4, "topk_group": 2}
# Family: (config class, router class, its config's name of the number of experts, its settings, ours where other).
PLAIN = {"normalisation": "plain"}
FAMILIES = {
    "v3, groups": (
        DeepseekV3Config, DeepseekV3TopkRouter, "n_routed_experts",
        {**V3_GROUPS, "norm_topk_prob": True, "routed_scaling_factor": 2.5}, V3,
    ),
    "v3, one group": (
        DeepseekV3Config, DeepseekV3TopkRouter, "n_routed_experts",
        {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5}, V3,
    ),
    "v3, one pick": (
        DeepseekV3Config, DeepseekV3TopkRouter, "n_routed_experts",
        {**V3_GROUPS, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "top_k": 1}, V3,
    ),
    "v3, not normalised": (
        DeepseekV3Config, DeepseekV3TopkRouter, "n_routed_experts",
        {**V3_GROUPS, "norm_topk_prob": False, "routed_scaling_factor": 2.5}, V3,
    ),
    "qwen2": (Qwen2MoeConfig, Qwen2MoeTopKRouter, "num_experts", {"norm_topk_prob": False}, PLAIN),
    "qwen2, normalised": (Qwen2MoeConfig, Qwen2MoeTopKRouter, "num_experts", {"norm_topk_prob": True}, PLAIN),
    "qwen3": (Qwen3MoeConfig, Qwen3MoeTopKRouter, "num_experts", {"norm_topk_prob": True}, PLAIN),
    "qwen3, one pick": (
        Qwen3MoeConfig, Qwen3MoeTopKRouter, "num_experts", {"norm_topk_prob": True, "top_k": 1}, PLAIN,
    ),
    "mixtral": (MixtralConfig, MixtralTopKRouter, "num_local_experts", {}, {**PLAIN, "norm_topk_prob": True}),
    "olmoe": (OlmoeConfig, OlmoeTopKRouter, "num_experts", {"norm_topk_prob": False}, PLAIN),
    "olmoe, normalised": (OlmoeConfig, OlmoeTopKRouter, "num_experts", {"norm_topk_prob": True}, PLAIN),
}  # fmt: skip


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


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_other_families_routers_equal_transformers_too(family):
    config_class, router_class, num_experts, theirs, ours_only = family
    theirs = {"top_k": 3, **theirs}
    settings = {**theirs, **ours_only}
    with float64_reference():
        config = {**theirs, num_experts: 8, "num_experts_per_tok": theirs["top_k"], "hidden_size": 16}
        config.pop("top_k")
        reference = router_class(config_class(**config))
        torch.nn.init.normal_(reference.weight, std=0.5)
        if hasattr(reference, "e_score_correction_bias"):
            # As large as the scores differ, and below zero too: a choice that ignores it is another.
            torch.nn.init.normal_(reference.e_score_correction_bias)
        x = torch.randn(29, 16, requires_grad=True)
        logits, weights, experts = reference(x)
        dense = torch.zeros(29, 8).scatter(1, experts, weights)
        # Single picks normalised to one have no gradient; the logits' part keeps it from being zero.
        (dense.pow(3).sum() + logits.square().sum()).backward()
    ours = router(**settings).double()
    missing = ours.load_state_dict(reference.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    y = x.detach().clone().requires_grad_()
    routing = ours(y)
    dense_ours = torch.zeros(29, 8, dtype=torch.float64).scatter(1, routing.experts_TK, routing.weights_TK)
    (dense_ours.pow(3).sum() + routing.logits_TE.square().sum()).backward()
    picked, picked_ours = (torch.zeros(29, 8).scatter(1, ids, 1.0) for ids in (experts, routing.experts_TK))
    assert torch.equal(picked, picked_ours)
    assert_close_relative(routing.logits_TE, logits, 1e-12, "logits")
    assert_close_relative(dense_ours, dense, 1e-12, "weights by expert")
    assert_close_relative(y.grad, x.grad, 1e-12, "token gradient")
    assert_close_relative(ours.weight.grad, reference.weight.grad, 1e-12, "weight gradient")


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("topk_method", ["greedy", "group_limited_greedy", "noaux_tc"])
def test_a_bias_moves_the_choice_and_never_the_weights(scoring, topk_method):
    ours = router(topk_method=topk_method, num_groups=4, topk_group=3, scoring=scoring, selection_bias=True)
    torch.nn.init.normal_(ours.weight)
    x = torch.randn(5, 16)
    # The favourite's group gets in by it, and the outcast loses against everything else that is allowed.
    ours.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0, -9.0, -1.0, -1.0]))
    routing = ours(x)
    assert (routing.experts_TK == 2).any(1).all() and not (routing.experts_TK == 5).any()
    torch.testing.assert_close(routing.weights_TK, routing.scores_TE.gather(1, routing.experts_TK))
    exact = (x @ ours.weight.t()).sigmoid() if scoring == "sigmoid" else (x @ ours.weight.t()).softmax(1)
    torch.testing.assert_close(routing.scores_TE, exact)


def test_biased_scores_below_zero_stay_inside_the_chosen_groups():
    ours = router(topk_method="group_limited_greedy", num_groups=4, topk_group=2, selection_bias=True, top_k=4)
    # The first two groups are the best, and below zero.
    ours.e_score_correction_bias.copy_(torch.tensor([-3.0] * 4 + [-9.0] * 4))
    assert ours(torch.randn(6, 16)).experts_TK.sort(1).values.tolist() == [[0, 1, 2, 3]] * 6


def test_shares_sum_to_one_whatever_the_scoring():
    for scoring in ("softmax", "sigmoid"):
        routing = router(scoring=scoring)(torch.randn(5, 16))
        torch.testing.assert_close(routing.shares_TE.sum(1), torch.ones(5))
        ratios = routing.scores_TE / routing.shares_TE
        torch.testing.assert_close(ratios, ratios[:, :1].expand(5, 8))


@pytest.mark.parametrize(
    "settings", [*SETTINGS.values(), {**V3, **V3_GROUPS, "norm_topk_prob": True}], ids=[*SETTINGS, "v3"]
)
def test_a_choice_that_is_handed_in_is_repeated_with_the_weights_of_now(settings):
    ours, x = router(**settings).double(), torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    torch.nn.init.normal_(ours.weight)
    first = ours(x)
    again = ours(x, experts_TK=first.experts_TK)
    assert again.experts_TK is first.experts_TK and torch.equal(again.weights_TK, first.weights_TK)
    for routing in (first, again):
        routing.weights_TK.pow(3).sum().backward()
    assert_close_relative(x.grad, 2 * torch.autograd.grad(ours(x).weights_TK.pow(3).sum(), x)[0], 1e-13, "gradient")


def test_a_near_tie_between_groups_does_not_undo_a_repeated_choice():
    ours = router(topk_method="group_limited_greedy", num_groups=4, topk_group=1, top_k=2)
    x = torch.randn(6, 16)
    # Another group than the router would choose now.
    other = (ours(x).experts_TK + 2) % 8
    again = ours(x, experts_TK=other)
    assert torch.equal(again.weights_TK, again.scores_TE.gather(1, other)) and (again.weights_TK > 0).all()


def test_a_weight_that_is_handed_in_takes_the_place_of_its_own():
    ours, x = router(), torch.randn(6, 16)
    given = torch.randn(8, 16, requires_grad=True)
    routing = ours(x, weight=given)
    assert_close_relative(routing.logits_TE, x @ given.t(), 1e-6, "logits")
    routing.weights_TK.pow(3).sum().backward()
    assert given.grad.any() and ours.weight.grad is None


def test_no_tokens_are_no_trouble():
    routing = router(**V3, **V3_GROUPS)(torch.randn(0, 16))
    assert routing.weights_TK.shape == (0, 3) and routing.experts_TK.shape == (0, 3)


@pytest.mark.parametrize("selection_bias", [False, True])
def test_the_bias_is_saved_under_transformers_name_and_only_where_it_is_wanted(selection_bias):
    ours = router(selection_bias=selection_bias)
    assert ("e_score_correction_bias" in ours.state_dict()) == selection_bias


def test_the_bias_stays_in_float32_when_the_model_leaves_it():
    ours = router(**V3, **V3_GROUPS)
    # bfloat16 would round the step away.
    ours.e_score_correction_bias.fill_(1.001)
    for narrow in (torch.bfloat16, torch.float16):
        ours.to(narrow)
        assert ours.weight.dtype == narrow and ours.e_score_correction_bias.dtype == torch.float32
    assert ours.e_score_correction_bias.tolist() == pytest.approx([1.001] * 8, abs=1e-7)
    assert dict(ours.named_buffers())["e_score_correction_bias"] is ours.e_score_correction_bias
    assert ours.double().e_score_correction_bias.dtype == torch.float64


def test_a_router_made_on_meta_starts_without_favourites():
    with torch.device("meta"):
        ours = router(**V3, **V3_GROUPS)
    ours.to_empty(device="cpu").e_score_correction_bias.fill_(3.0)
    ours.reset_parameters()
    assert not ours.e_score_correction_bias.any() and ours.weight.any()


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


@pytest.mark.parametrize("settings", [*SETTINGS.values(), {**V3, **V3_GROUPS}], ids=[*SETTINGS, "v3"])
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
        ({"topk_method": "best"}, ["best", "greedy", "group_limited_greedy", "noaux_tc"]),
        ({"scoring": "tanh"}, ["scoring='tanh'", "softmax", "sigmoid"]),
        ({"normalisation": "v1"}, ["normalisation='v1'", "v2", "v3", "plain"]),
        ({"topk_method": "noaux_tc", "num_groups": 8}, ["num_groups=8", "2 best", "[1, 2, 4]"]),
        ({"topk_method": "noaux_tc", "num_groups": 4}, ["top_k=3", "topk_group=1", "at least 2"]),
        (
            {"topk_method": "group_limited_greedy", "num_groups": 4, "selection_bias": True},
            ["top_k=3", "topk_group=1", "at least 2"],
        ),
        ({"topk_method": "group_limited_greedy", "num_groups": 3}, ["num_groups=3", "[1, 2, 4, 8]"]),
        ({"topk_method": "group_limited_greedy", "num_groups": 4, "topk_group": 5}, ["topk_group=5", "num_groups=4"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ConfigError) as raised:
        router(**settings)
    assert all(word in str(raised.value) for word in words)
