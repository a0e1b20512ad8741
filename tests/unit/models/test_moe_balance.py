"""Catches a balance or z-loss with the wrong normalisation, one that counts padding, one with a gradient through
the counts, and one that reaches the training loss twice, not at all, or without its scaling. Slices of the sequence
on several ranks: tests/distributed/test_balance_ranks.py.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_npu_tp.kernels import select
from lightning_npu_tp.models.moe.balance import batch_balance_loss, router_z_loss, sequence_balance_loss
from lightning_npu_tp.models.moe.block import MoEBlock
from lightning_npu_tp.parallel.forward_pass import ForwardPass

LOSSES = {"sequence": sequence_balance_loss, "batch": batch_balance_loss}
ALPHA = 0.01


def routed(num_sequences=3, length=5, num_experts=6, num_picks=2):
    scores = torch.randn(num_sequences, length, num_experts, dtype=torch.float64).softmax(-1).requires_grad_()
    return scores, scores.topk(num_picks, dim=-1).indices


def by_definition(scores, experts, mask, *, per_sequence: bool):
    """Sum over experts of f * P, written out in Python."""
    num_experts, num_picks = scores.shape[2], experts.shape[2]
    sequences = [[(b, s) for s in range(scores.shape[1]) if mask[b, s]] for b in range(scores.shape[0])]
    sets = [s for s in sequences if s] if per_sequence else [sum(sequences, [])]
    losses = []
    for tokens in sets:
        loss = 0.0
        for expert in range(num_experts):
            picks = sum(int(experts[b, s, k]) == expert for b, s in tokens for k in range(num_picks))
            mean_score = sum(scores[b, s, expert] for b, s in tokens) / len(tokens)
            loss = loss + picks / (num_picks * len(tokens) / num_experts) * mean_score
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_and_its_gradient_follow_the_definition(name, masked):
    scores, experts = routed()
    mask = torch.ones(3, 5, dtype=torch.bool)
    if masked:
        mask[0, 3:] = mask[1] = False
    expected = by_definition(scores, experts, mask, per_sequence=name == "sequence")
    actual = LOSSES[name](scores, experts, mask if masked else None)
    torch.testing.assert_close(actual, expected)
    expected_grad, actual_grad = (torch.autograd.grad(loss, scores)[0] for loss in (expected, actual))
    torch.testing.assert_close(actual_grad, expected_grad)
    assert not actual_grad[~mask].any()


@pytest.mark.parametrize("name", LOSSES)
def test_an_even_router_scores_one_and_a_collapsed_one_as_many_as_there_are_experts(name):
    even = torch.full((1, 6, 6), 1 / 6)
    assert LOSSES[name](even, torch.arange(6).view(1, 6, 1)).item() == pytest.approx(1.0)
    collapsed = torch.zeros(1, 6, 6)
    collapsed[..., 2] = 1.0
    assert LOSSES[name](collapsed, torch.full((1, 6, 1), 2)).item() == pytest.approx(6.0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_padding_only_has_loss_zero_and_a_finite_gradient(name):
    scores, experts = routed()
    loss = LOSSES[name](scores, experts, torch.zeros(3, 5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0 and not scores.grad.any()


@pytest.mark.parametrize("mask", [None, [True, False, True, False]], ids=["all", "masked"])
def test_the_z_loss_and_its_gradient_follow_the_definition(mask):
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    rows = [row for row, counts in zip(logits, mask or [True] * 4, strict=True) if counts]
    expected = sum(torch.log(torch.exp(row).sum()) ** 2 for row in rows) / len(rows)
    actual = router_z_loss(logits, None if mask is None else torch.tensor(mask))
    torch.testing.assert_close(actual, expected)
    expected_grad, actual_grad = (torch.autograd.grad(loss, logits)[0] for loss in (expected, actual))
    torch.testing.assert_close(actual_grad, expected_grad)


def test_the_z_loss_survives_large_logits_and_the_absence_of_tokens():
    assert router_z_loss(torch.full((1, 1), 1000.0)).item() == pytest.approx(1e6)
    for logits, mask in ((torch.zeros(0, 6), None), (torch.randn(3, 6), torch.zeros(3, dtype=torch.bool))):
        logits.requires_grad_()
        loss = router_z_loss(logits, mask)
        loss.backward()
        assert loss.item() == 0.0 and not logits.grad.any()


def block(**settings) -> MoEBlock:
    torch.manual_seed(3)
    made = MoEBlock(
        hidden_size=8, expert_width=8, num_experts=4, top_k=2, kernels=select("cpu"), aux_loss_alpha=ALPHA, **settings
    ).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def run(moe, x, mask=None):
    """The block's output and its balance losses, as the model around it would get them."""
    step = ForwardPass(moe.region, mask)
    return moe(x, step), step.balance_losses


@pytest.mark.parametrize("seq_aux", [True, False])
def test_the_block_hands_over_alpha_times_the_loss_of_its_own_routing(seq_aux):
    moe, x = block(seq_aux=seq_aux), torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    _, (loss,) = run(moe, x, mask)
    routing = moe.gate(x.flatten(0, 1))
    scores, experts = routing.scores_TE.view(2, 5, 4), routing.experts_TK.view(2, 5, 2)
    expected = by_definition(scores, experts, mask.bool(), per_sequence=seq_aux)
    torch.testing.assert_close(loss, ALPHA * expected)


def test_there_is_no_auxiliary_loss_in_evaluation_nor_without_alpha():
    moe, x = block(), torch.randn(1, 5, 8, dtype=torch.float64)
    assert len(run(moe, x)[1]) == 1
    assert run(moe.eval(), x)[1] == []
    moe.train().aux_loss_alpha = 0.0
    assert run(moe, x)[1] == []


def test_it_reaches_the_router_and_the_tokens_with_the_scale_of_the_loss():
    moe, x = block(), torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    _, (loss,) = run(moe, x)
    full = torch.autograd.grad(loss, (moe.gate.weight, x), retain_graph=True)
    quarter = torch.autograd.grad(loss / 4, (moe.gate.weight, x))
    for got, wanted in zip(quarter, full, strict=True):
        assert wanted.any()
        torch.testing.assert_close(4 * got, wanted)


def test_activation_checkpointing_keeps_its_gradient():
    moe, x = block(), torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    gradients = []
    for forward in (moe, lambda hidden, step: checkpoint(moe, hidden, step, use_reentrant=False)):
        step = ForwardPass(moe.region)
        y = forward(x, step)
        loss = y.square().sum() + 100 * sum(step.balance_losses)
        gradients.append(torch.autograd.grad(loss, (x, *moe.parameters())))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_a_block_holds_nothing_of_a_step_but_its_counts_and_a_copy_not_even_those():
    moe, x = block(), torch.randn(1, 5, 8, dtype=torch.float64)
    before = set(vars(moe))
    y, losses = run(moe, x, torch.ones(1, 5))
    held = {name for name, value in vars(moe).items() if isinstance(value, torch.Tensor)}
    assert losses and set(vars(moe)) == before and held == {"tokens_per_expert", "pending_tokens_per_expert"}
    twin = copy.deepcopy(moe)
    assert twin.tokens_per_expert is None and twin.pending_tokens_per_expert is None
    assert torch.equal(twin(x), y)
    torch.save(moe, io.BytesIO())
