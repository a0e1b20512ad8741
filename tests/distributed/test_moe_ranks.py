"""Catches a sharded mixture of experts that is right on one rank only: a router whose gradient holds one
rank's experts, an input gradient counted once per rank or once too few, an expert on the wrong rank, rows of
another rank's experts that leak, and an auxiliary loss that is counted twice.

Every case is compared in float64 with transformers' own block in one process.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.kernels import select
from lightning_npu_tp.models.moe.block import MoEBlock
from lightning_npu_tp.models.moe.dispatch import AllToAll, Replicated
from lightning_npu_tp.parallel import collectives
from lightning_npu_tp.parallel.forward_pass import ForwardPass
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes
from lightning_npu_tp.parallel.tensor_region import Region
from lightning_npu_tp.tools.testing.operators import CountOperators
from lightning_npu_tp.tools.testing.reference import assert_close_relative, float64_reference

HIDDEN, WIDTH, NUM_EXPERTS, ALPHA = 32, 16, 8, 0.05
TOLERANCE = 1e-10
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "groups": {"config": GROUPS},
    "padded": {"mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]},
    "experts without tokens": {"starve": True},
    "one token": {"shape": (1, 1)},
    "every expert": {"config": {"num_experts_per_tok": NUM_EXPERTS}},
    "one pick": {"config": {"num_experts_per_tok": 1}},
    "grouped matmul of cuda": {"overrides": {"grouped_matmul": "torch_native"}},
    "DTensor parameters": {"dtensor": True},
}


class PartialMLP(nn.Module):
    """A rank's part of the shared experts: its columns of gate and up, its rows of down."""

    def __init__(self, state: dict[str, Tensor], rank: int, ranks: int) -> None:
        super().__init__()
        self.gate, self.up = (
            nn.Parameter(state[f"shared_experts.{name}_proj.weight"].chunk(ranks)[rank].clone())
            for name in ("gate", "up")
        )
        self.down = nn.Parameter(state["shared_experts.down_proj.weight"].chunk(ranks, dim=1)[rank].clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


def make_block(rank: int, ranks: int, problem: dict[str, Any], **settings: Any) -> MoEBlock:
    """This rank's block with its part of the problem's parameters."""
    config, state = problem["config"], problem["state"]
    block = MoEBlock(
        hidden_size=HIDDEN,
        expert_width=WIDTH,
        num_experts=NUM_EXPERTS,
        top_k=config.num_experts_per_tok,
        topk_method=config.topk_method,
        num_groups=config.n_group,
        topk_group=config.topk_group,
        routed_scaling_factor=config.routed_scaling_factor,
        kernels=select("cpu", problem.get("overrides")),
        aux_loss_alpha=ALPHA,
        **settings,
    ).double()
    assert block.experts.num_local == NUM_EXPERTS // ranks
    with torch.no_grad():
        block.gate.weight.copy_(state["gate.weight"])
        block.experts.gate_up_proj.copy_(state["experts.gate_up_proj"].chunk(ranks)[rank])
        block.experts.down_proj.copy_(state["experts.down_proj"].chunk(ranks)[rank])
    return block


def replicated(ranks: int) -> dict[str, Any]:
    """Settings of a block whose tokens all ranks see."""
    groups = Groups(Meshes.build(Layout.resolve(world=ranks), "cpu"))
    return {"region": Region(groups), "dispatcher": Replicated(groups.expert)}


def whole_group() -> dist.ProcessGroup:
    return dist.group.WORLD


def make_dtensors(block: MoEBlock, ranks: int) -> None:
    """Replace parameters as conversion does: DTensors of global shape."""
    mesh = init_device_mesh("cpu", (ranks,))
    for owner, name in ((block.gate, "weight"), (block.experts, "gate_up_proj"), (block.experts, "down_proj")):
        placement = Replicate() if owner is block.gate else Shard(0)
        tensor = DTensor.from_local(getattr(owner, name).detach(), mesh, (placement,))
        setattr(owner, name, nn.Parameter(tensor))


def local_grad(parameter: Tensor) -> Tensor:
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


def replicated_step(rank: int, ranks: int, problem: dict[str, Any]) -> dict[str, Tensor]:
    """Forward and backward of the output and the auxiliary loss, on tokens that all ranks see."""
    block = make_block(
        rank, ranks, problem, **replicated(ranks), shared_experts=PartialMLP(problem["state"], rank, ranks)
    )
    if problem.get("dtensor"):
        make_dtensors(block, ranks)
    x = problem["x"].clone().requires_grad_()
    step = ForwardPass(block.region, problem["mask"])
    y = block(x, step)
    (aux_loss,) = step.balance_losses
    ((y * problem["grad"]).sum() + aux_loss).backward()
    assert isinstance(block.experts.down_proj.grad, DTensor) == bool(problem.get("dtensor"))
    return {
        "output": y.detach(),
        "aux loss": aux_loss.detach(),
        "input gradient": x.grad,
        "gate.weight": local_grad(block.gate.weight),
        "experts.gate_up_proj": local_grad(block.experts.gate_up_proj),
        "experts.down_proj": local_grad(block.experts.down_proj),
        "shared_experts.gate_proj.weight": block.shared_experts.gate.grad,
        "shared_experts.up_proj.weight": block.shared_experts.up.grad,
        "shared_experts.down_proj.weight": block.shared_experts.down.grad,
    }


def reference_aux_loss(block: DeepseekV2Moe, x: Tensor, mask: Tensor | None) -> Tensor:
    """The sequence-wise loss, one sequence after the other."""
    losses = []
    for b, sequence in enumerate(x):
        tokens = sequence if mask is None else sequence[mask[b].bool()]
        scores = (tokens @ block.gate.weight.t()).softmax(-1)
        picks = torch.bincount(block.gate(tokens)[2].flatten(), minlength=NUM_EXPERTS).double()
        share = picks / (len(tokens) * block.gate.top_k / NUM_EXPERTS)
        losses.append((share * scores.mean(0)).sum())
    return ALPHA * torch.stack(losses).mean()


def make_problem(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the ranks are given, and what transformers' block makes of it."""
    with float64_reference():
        config = DeepseekV2Config(
            **{
                "hidden_size": HIDDEN,
                "num_attention_heads": 4,
                "moe_intermediate_size": WIDTH,
                "n_routed_experts": NUM_EXPERTS,
                "num_experts_per_tok": 3,
                "n_shared_experts": 2,
                **case.get("config", {}),
            }
        )
        config._experts_implementation = "eager"
        reference = DeepseekV2Moe(config)
        for parameter in reference.parameters():
            nn.init.normal_(parameter, std=0.3)
        x = torch.randn(*case.get("shape", (2, 5)), HIDDEN)
        if case.get("starve"):
            # One input is always large, and only three experts like it: some ranks have nothing to do.
            x[..., 0] = 50.0
            reference.gate.weight.data[:, 0] = -1.0
            reference.gate.weight.data[[1, 4, 5], 0] = 1.0
        mask = torch.tensor(case["mask"]) if "mask" in case else None
        x.requires_grad_()
        y, grad = reference(x), torch.randn_like(x)
        aux_loss = reference_aux_loss(reference, x, mask)
        ((y * grad).sum() + aux_loss).backward()
    expected = {"output": y.detach(), "aux loss": aux_loss.detach(), "input gradient": x.grad}
    expected |= {name: parameter.grad for name, parameter in reference.named_parameters()}
    problem = {**case, "config": config, "x": x.detach(), "grad": grad, "mask": mask}
    return {**problem, "state": {name: value.detach() for name, value in reference.state_dict().items()}}, expected


def joined(name: str, parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=1 if name == "shared_experts.down_proj.weight" else 0)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_replicated_tokens_give_the_numbers_of_one_process(on_ranks, case, ranks):
    problem, expected = make_problem(case)
    results = on_ranks(replicated_step, ranks, problem)
    for name, wanted in expected.items():
        parts = [result[name] for result in results]
        if "experts." in name:
            assert_close_relative(joined(name, parts), wanted, TOLERANCE, name)
        else:
            for rank, part in enumerate(parts):
                assert_close_relative(part, wanted, TOLERANCE, f"{name} on rank {rank}")


def own_tokens_step(rank: int, ranks: int, problem: dict[str, Any], counts: list[int]) -> dict[str, Tensor]:
    """The same with tokens of its own for each rank, which travel to the experts."""
    tokens = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    shared = PartialMLP(problem["state"], 0, 1)
    block = make_block(rank, ranks, problem, dispatcher=AllToAll(whole_group), shared_experts=shared)
    x = problem["x"][:, tokens].clone().requires_grad_()
    y = block(x)
    (y * problem["grad"][:, tokens]).sum().backward()
    return {
        "output": y.detach(),
        "input gradient": x.grad,
        "gate.weight": block.gate.weight.grad,
        "experts.gate_up_proj": block.experts.gate_up_proj.grad,
        "experts.down_proj": block.experts.down_proj.grad,
        "shared_experts.gate_proj.weight": shared.gate.grad,
    }


@pytest.mark.parametrize(
    "counts, starve",
    [([10], False), ([7, 3], False), ([5, 0, 4, 1], False), ([4, 6], True), ([0, 0, 10, 0], True)],
    ids=["one rank", "uneven", "rank without tokens", "few experts", "one rank has all"],
)
def test_tokens_that_travel_to_their_experts_give_the_numbers_of_one_process(on_ranks, counts, starve):
    # Without the auxiliary loss, whose mean over sequences the owner of the layout takes.
    problem, _ = make_problem({"shape": (1, 10), "starve": starve})
    with float64_reference():
        reference = DeepseekV2Moe(problem["config"])
        reference.load_state_dict(problem["state"])
        x = problem["x"].clone().requires_grad_()
        y = reference(x)
        y.backward(problem["grad"])
    results = on_ranks(own_tokens_step, len(counts), problem, counts)
    together = {name: [result[name] for result in results] for name in results[0]}
    assert_close_relative(torch.cat(together["output"], dim=1), y, TOLERANCE, "output")
    assert_close_relative(torch.cat(together["input gradient"], dim=1), x.grad, TOLERANCE, "input gradient")
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        assert_close_relative(torch.cat(together[name]), reference.get_parameter(name).grad, TOLERANCE, name)
    # Replicated over the ranks of a data-parallel layout, where the strategy sums them.
    for name in ("gate.weight", "shared_experts.gate_proj.weight"):
        assert_close_relative(sum(together[name]), reference.get_parameter(name).grad, TOLERANCE, name)


def order_of_events(rank: int, ranks: int, problem: dict[str, Any]) -> tuple[list[str], list[str]]:
    """When rows are sent and waited for, and when the shared experts compute, forward and backward."""
    events: list[str] = []
    shared = PartialMLP(problem["state"], 0, 1)
    shared.register_forward_hook(lambda *_: events.append("shared"))
    shared.down.register_hook(lambda _: events.append("shared"))
    block = make_block(rank, ranks, problem, dispatcher=AllToAll(whole_group), shared_experts=shared)
    start, finish = collectives._Transfer.start, collectives._Transfer.finish

    def logged_start(self: Any, *arguments: Any) -> Tensor:
        events.append("send")
        return start(self, *arguments)

    def logged_finish(self: Any) -> Tensor:
        events.append("wait")
        return finish(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives._Transfer, "start", logged_start)
        patch.setattr(collectives._Transfer, "finish", logged_finish)
        output = block(problem["x"].clone().requires_grad_())
        forward, events[:] = list(events), []
        output.sum().backward()
    return forward, list(events)


def test_shared_experts_compute_while_rows_travel(on_ranks):
    problem, _ = make_problem({})
    for forward, backward in on_ranks(order_of_events, 2, problem):
        assert forward == ["send", "shared", "wait", "send", "wait"]
        # The answers' way back first, then the rows'; the shared experts within the latter.
        assert backward == ["send", "wait", "send", "shared", "wait"], backward


def count_stalls(rank: int, ranks: int, problem: dict[str, Any]) -> list[str]:
    block = make_block(
        rank, ranks, problem, **replicated(ranks), shared_experts=PartialMLP(problem["state"], rank, ranks)
    )
    x = problem["x"].float().requires_grad_()
    block = block.float()
    with CountOperators() as operators:
        step = ForwardPass(block.region)
        y = block(x, step)
        (y.sum() + sum(step.balance_losses)).backward()
    return [str(sighting) for sighting in operators.found()]


@pytest.mark.parametrize("name", ["torch_native", "reference"])
def test_a_rank_reads_nothing_on_the_host_while_tokens_are_replicated(on_ranks, name):
    problem, _ = make_problem({"overrides": {"grouped_matmul": name}})
    assert on_ranks(count_stalls, 2, problem) == [[], []]


def refused_size(rank: int, ranks: int) -> str:
    try:
        MoEBlock(hidden_size=8, expert_width=8, num_experts=9, top_k=2, kernels=select("cpu"), **replicated(2))
    except ConfigError as error:
        return str(error)
    return ""


def test_a_group_that_does_not_divide_the_experts_is_refused_with_those_that_do(on_ranks):
    for message in on_ranks(refused_size, 2):
        assert "expert_parallel_size=2" in message and "9 experts" in message and "[1, 3, 9]" in message
