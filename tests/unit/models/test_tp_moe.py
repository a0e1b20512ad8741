"""The unit tests that the project's founding memo lists, by its names, and those of the same kind that it implies.

They would catch a mixture-of-experts block whose numbers are not those of transformers' own, in one
process; what only several ranks can show is in tests/distributed/test_moe_ranks.py, and details are in
test_kernels.py, test_router.py and test_moe_balance.py. The reference computes in float64, where a
mistake cannot pass for rounding.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from lightning_npu_tp.convert.convert import convert
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.kernels import select
from lightning_npu_tp.kernels.rows import sort_picks
from lightning_npu_tp.models.moe.block import MoEBlock
from lightning_npu_tp.models.moe.experts import RoutedExperts
from lightning_npu_tp.models.moe.router import TopKRouter
from lightning_npu_tp.parallel.collectives import start_exchange
from lightning_npu_tp.parallel.forward_pass import ForwardPass
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes
from lightning_npu_tp.tools.testing.models import random_batch, reference_model, tiny_deepseek_v2_config
from lightning_npu_tp.tools.testing.operators import CountOperators
from lightning_npu_tp.tools.testing.reference import assert_close_relative, float64_reference

HIDDEN, WIDTH, NUM_EXPERTS, TOP_K = 32, 16, 8, 3
# Every way to compute routed experts: fused, and composed of each grouped matmul.
KERNELS = {"fused": None, **{name: {"grouped_matmul": name} for name in ("reference", "cpu", "torch_native")}}
every_kernel = pytest.mark.parametrize("overrides", KERNELS.values(), ids=KERNELS)
EXACT = 1e-12


def reference_block(**settings) -> DeepseekV2Moe:
    """transformers' block, eager; call it inside `float64_reference`."""
    config = DeepseekV2Config(
        **{
            "hidden_size": HIDDEN,
            "num_attention_heads": 4,
            "moe_intermediate_size": WIDTH,
            "n_routed_experts": NUM_EXPERTS,
            "num_experts_per_tok": TOP_K,
            "n_shared_experts": 2,
            **settings,
        }
    )
    config._experts_implementation = "eager"
    block = DeepseekV2Moe(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def block_like(reference: DeepseekV2Moe, overrides=None, **settings) -> MoEBlock:
    """Our block with copies of the reference's parameters."""
    config = reference.config
    block = MoEBlock(
        hidden_size=config.hidden_size,
        expert_width=config.moe_intermediate_size,
        num_experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        topk_method=config.topk_method,
        num_groups=config.n_group,
        topk_group=config.topk_group,
        routed_scaling_factor=config.routed_scaling_factor,
        hidden_act=config.hidden_act,
        kernels=select("cpu", overrides),
        shared_experts=type(reference.shared_experts)(config, intermediate_size=2 * config.moe_intermediate_size),
        **settings,
    ).double()
    block.load_state_dict(reference.state_dict())
    return block


def compare_with_transformers(overrides, *, shape=(2, 5), prepare=None, **settings) -> MoEBlock:
    """Compare output and every gradient; returns our block with its gradients."""
    with float64_reference():
        reference = reference_block(**settings)
        x = torch.randn(*shape, HIDDEN)
        if prepare is not None:
            prepare(reference, x)
        x.requires_grad_()
        expected, grad = reference(x), torch.randn(*shape, HIDDEN)
        expected.backward(grad)
    block, y = block_like(reference, overrides), x.detach().clone().requires_grad_()
    actual = block(y)
    actual.backward(grad)
    assert_close_relative(actual, expected, EXACT, "output")
    assert_close_relative(y.grad, x.grad, EXACT, "input gradient")
    for name, parameter in block.named_parameters():
        assert_close_relative(parameter.grad, reference.get_parameter(name).grad, EXACT, f"gradient of {name}")
    return block


# --- the memo's tests


def exchange_forward_and_backward(rank: int, world_size: int, counts: list[list[int]]) -> bool:
    """counts[source][destination] rows; each row says where it comes from and goes to."""
    send, recv = counts[rank], [row[rank] for row in counts]
    rows = [[rank, to, n] for to, count in enumerate(send) for n in range(count)]
    sent = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3).requires_grad_()
    received = start_exchange(sent, send, recv, dist.group.WORLD).wait()
    expected = [[source, rank, n] for source, count in enumerate(recv) for n in range(count)]
    assert received.tolist() == expected
    # Each row comes back times ten plus the rank that had it, so a gradient that took a wrong turn shows.
    received.backward(received.detach() * 10 + rank)
    destination = sent.detach()[:, 1:2]
    assert torch.equal(sent.grad, sent.detach() * 10 + destination)
    return True


@pytest.mark.parametrize(
    "counts", [[[2, 3], [1, 0]], [[0, 0], [0, 4]], [[0, 5], [0, 2]]], ids=["uneven", "a rank sends none", "all to one"]
)
def test_all_to_all_autograd(on_ranks, counts):
    assert on_ranks(exchange_forward_and_backward, 2, counts) == [True, True]


def test_router_forward():
    router = TopKRouter(hidden_size=4, num_experts=4, top_k=2, routed_scaling_factor=3.0)
    router.weight.data = torch.eye(4)
    routing = router(torch.tensor([[math.log(4), math.log(3), math.log(2), 0.0]]))
    # exp of the logits are 4, 3, 2, 1, which add up to ten.
    torch.testing.assert_close(routing.scores_TE, torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    by_expert = torch.zeros(1, 4).scatter(1, routing.experts_TK, routing.weights_TK)
    torch.testing.assert_close(by_expert, torch.tensor([[1.2, 0.9, 0.0, 0.0]]))


def test_router_backward():
    router = TopKRouter(hidden_size=5, num_experts=4, top_k=2).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def weights_and_scores(x, weight):
        router.weight = torch.nn.Parameter(weight)
        routing = torch.func.functional_call(router, {"weight": weight}, (x,))
        return routing.weights_TK, routing.scores_TE

    assert torch.autograd.gradcheck(weights_and_scores, (x, torch.randn(4, 5, dtype=torch.float64).requires_grad_()))


def test_auxiliary_loss():
    with float64_reference():
        reference = reference_block()
    block = block_like(reference, aux_loss_alpha=0.01)
    x = torch.randn(3, 7, HIDDEN, dtype=torch.float64)
    step = ForwardPass(block.region)
    output = block(x, step)
    (aux_loss,) = step.balance_losses
    scores = (x.flatten(0, 1) @ block.gate.weight.t()).softmax(-1)
    picked = scores.topk(TOP_K).indices.view(3, -1)
    counts = torch.stack([torch.bincount(row, minlength=NUM_EXPERTS) for row in picked]).double()
    share = counts / (7 * TOP_K / NUM_EXPERTS)
    expected = 0.01 * (share * scores.view(3, 7, -1).mean(1)).sum(1).mean()
    assert_close_relative(aux_loss, expected, EXACT, "auxiliary loss")
    expected_grad, grad = (torch.autograd.grad(loss, block.gate.weight)[0] for loss in (expected, aux_loss))
    assert_close_relative(grad, expected_grad, EXACT, "gradient of the auxiliary loss")
    # It stands beside the output, never in it: transformers computes none.
    assert torch.equal(output, block_like(reference, aux_loss_alpha=0.0)(x))


def test_experts_initialization():
    experts = RoutedExperts(hidden_size=64, expert_width=48, num_local_experts=4, kernels=select("cpu"))
    assert experts.gate_up_proj.shape == (4, 96, 64) and experts.down_proj.shape == (4, 64, 48)
    for parameter in experts.parameters():
        assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
        assert not torch.equal(parameter[0], parameter[1])
    with torch.device("meta"):
        block = MoEBlock(hidden_size=8, expert_width=8, num_experts=4, top_k=2, kernels=select("cpu"))
    assert {name: tuple(p.shape) for name, p in block.named_parameters()} == {
        "gate.weight": (4, 8),
        "experts.gate_up_proj": (4, 16, 8),
        "experts.down_proj": (4, 8, 8),
    }
    assert all(p.is_meta for p in block.parameters())
    with pytest.raises(ConfigError, match="hidden_act='sillu'"):
        RoutedExperts(hidden_size=8, expert_width=8, num_local_experts=1, kernels=select("cpu"), hidden_act="sillu")


@every_kernel
def test_expert_forward(overrides):
    experts = RoutedExperts(hidden_size=8, expert_width=8, num_local_experts=2, kernels=select("cpu", overrides))
    experts = experts.double()
    torch.nn.init.normal_(experts.gate_up_proj), torch.nn.init.normal_(experts.down_proj)
    x = torch.randn(3, 8, dtype=torch.float64)
    # Experts 4 and 5 of a larger model are here; expert 0 is another rank's.
    ids, weights = torch.tensor([[5, 0], [4, 5], [0, 1]]), torch.rand(3, 2, dtype=torch.float64)
    y = experts(x, weights, sort_picks(ids, first=4, num_local=2))

    def expert(number, token):
        gate, up = (experts.gate_up_proj[number] @ token).chunk(2)
        return experts.down_proj[number] @ (torch.nn.functional.silu(gate) * up)

    expected = torch.stack(
        [
            weights[0, 0] * expert(1, x[0]),
            weights[1, 0] * expert(0, x[1]) + weights[1, 1] * expert(1, x[1]),
            torch.zeros(8, dtype=torch.float64),
        ]
    )
    assert_close_relative(y, expected, EXACT, "weighted sum of the local experts")
    assert not y[2].any()


@every_kernel
def test_moe_forward(overrides):
    with float64_reference():
        reference = reference_block()
        x = torch.randn(2, 5, HIDDEN)
        expected = reference(x)
    block = block_like(reference, overrides)
    assert_close_relative(block(x), expected, EXACT, "output")
    picks = reference.gate(x)[2]
    assert block.tokens_per_expert.tolist() == torch.bincount(picks.flatten(), minlength=NUM_EXPERTS).tolist()


@every_kernel
def test_moe_backward(overrides):
    compare_with_transformers(overrides)


# --- of the same kind, for the block; the whole converted model comes last


def deepseek_forward(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    config = tiny_deepseek_v2_config()
    model, batch = reference_model(config), random_batch(config, 2, 9, seed=1)
    meshes, groups = Meshes.build(Layout.resolve(world=world_size), "cpu"), Groups()
    groups.bind(meshes)
    cpu = torch.device("cpu")
    convert(model, meshes=meshes, groups=groups, kernels=select("cpu"), device=cpu, dtype=None, seed=0)
    output = model(**batch, gather_logits=True)
    num_local = model.model.layers[1].mlp.experts.num_local
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), "experts": num_local}


@pytest.mark.parametrize("world_size", [1, 2])
def test_deepseek_forward(on_ranks, world_size):
    config = tiny_deepseek_v2_config()
    batch = random_batch(config, 2, 9, seed=1)
    with float64_reference(), torch.no_grad():
        expected = reference_model(config)(**batch)
    for result in on_ranks(deepseek_forward, world_size):
        assert result["experts"] == config.n_routed_experts // world_size
        assert_close_relative(result["loss"], expected.loss, EXACT, "loss")
        assert_close_relative(result["logits"], expected.logits, EXACT, "logits")


@every_kernel
def test_group_limited_routing(overrides):
    groups = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
    compare_with_transformers(overrides, **groups)


@every_kernel
def test_zero_token_experts(overrides):
    def starve_most_experts(reference, x):
        # One input is always large, and only experts 1, 4 and 6 like it.
        x[..., 0] = 50.0
        reference.gate.weight.data[:, 0] = -1.0
        reference.gate.weight.data[[1, 4, 6], 0] = 1.0

    block = compare_with_transformers(overrides, prepare=starve_most_experts)
    assert block.tokens_per_expert.tolist() == [0, 10, 0, 0, 10, 0, 10, 0]
    starved = [0, 2, 3, 5, 7]
    for parameter in (block.experts.gate_up_proj, block.experts.down_proj):
        assert torch.equal(parameter.grad[starved], torch.zeros_like(parameter.grad[starved]))


@every_kernel
@pytest.mark.parametrize("shape, top_k", [((1, 1), TOP_K), ((2, 5), NUM_EXPERTS), ((2, 5), 1)])
def test_extreme_sizes(overrides, shape, top_k):
    compare_with_transformers(overrides, shape=shape, num_experts_per_tok=top_k)


def test_other_activations():
    compare_with_transformers(None, hidden_act="gelu")


def test_shared_experts():
    with float64_reference():
        reference = reference_block()
        x = torch.randn(2, 5, HIDDEN)
        shared = reference.shared_experts(x)
    block = block_like(reference)
    together = block(x)
    block.shared_experts = None
    assert_close_relative(together - block(x), shared, EXACT, "what the shared experts add")


def test_dense_precision():
    """bf16-true: everything but the router in bfloat16, within bfloat16's error of the exact result."""
    with float64_reference():
        reference = reference_block()
        x = torch.randn(2, 50, HIDDEN)
    block = block_like(reference).bfloat16()
    exact = block_like(reference)
    # The exact block routes by the same rounded router and tokens.
    exact.load_state_dict({name: value.double() for name, value in block.state_dict().items()})
    y = block(x.bfloat16())
    assert y.dtype == torch.bfloat16
    # Four bfloat16 roundings of 2^-9 relative each, added at random.
    assert_close_relative(y, exact(x.bfloat16().double()), 1e-2, "bfloat16 output")


class MatmulDtypes(TorchDispatchMode):
    """Collects the dtype of every matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm"):
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_mixed_precision(device_type):
    """bf16-mixed: float32 parameters and gradients, bfloat16 matmuls, except the router's."""
    with float64_reference():
        reference = reference_block()
    block = block_like(reference).float()
    block.experts = RoutedExperts(
        hidden_size=HIDDEN, expert_width=WIDTH, num_local_experts=NUM_EXPERTS, kernels=select(device_type)
    )
    x = torch.randn(2, 5, HIDDEN, requires_grad=True)
    with MatmulDtypes() as matmuls:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(x)
        y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float32
    assert {p.grad.dtype for p in block.parameters()} == {torch.float32}
    # The router's forward and its two gradients; beside them nine of the shared experts, and of the routed
    # ones six in all (grouped) or six for each expert.
    assert matmuls.seen.count(torch.float32) == 3
    assert matmuls.seen.count(torch.bfloat16) >= 9 + 6


def test_activation_out_of_autocasts_reach():
    """On a card autocast widens some activations (gelu_new, mish) to float32, which the next matmul would refuse."""
    experts = RoutedExperts(
        hidden_size=8, expert_width=8, num_local_experts=2, kernels=select("cpu"), hidden_act="gelu_new"
    )
    seen: list[bool] = []
    experts.act_fn.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    rows = sort_picks(torch.tensor([[1], [0]]), first=0, num_local=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        experts(torch.randn(2, 8), torch.ones(2, 1), rows)
    assert seen == [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("overrides", [{"grouped_matmul": "torch_native"}, {"grouped_matmul": "reference"}], ids=str)
def test_no_dynamic_operators(overrides, dtype):
    """What runs on cuda and npu reads nothing on the host and has shapes that depend on no value."""
    groups = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    with float64_reference():
        reference = reference_block(**groups)
    block = block_like(reference, overrides, aux_loss_alpha=0.01).to(dtype)
    x, mask = torch.randn(2, 5, HIDDEN, dtype=dtype, requires_grad=True), torch.ones(2, 5)
    with CountOperators() as operators:
        step = ForwardPass(block.region, mask)
        output = block(x, step)
        (output.sum() + sum(step.balance_losses)).backward()
    assert not operators.found(), "\n".join(map(str, operators.found()))
    assert not any("one_hot" in name for name in operators.counts)
    # The count works: the CPU's own kernels do read counts.
    with CountOperators() as operators:
        block_like(reference).to(dtype)(x)
    assert operators.found()
