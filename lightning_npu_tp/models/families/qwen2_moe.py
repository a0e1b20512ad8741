"""Qwen2-MoE (Qwen1.5-MoE too): Qwen2's attention, mixtures of experts beside a gated shared expert.

A sliding window is refused. Beside transformers' balance loss (output_router_logits, over all layers at once) there
is the blocks' own, by `aux_loss_alpha`, which goes layer by layer; both are off unless asked for.
Source: arXiv:2407.10671; module and parameter names are transformers'.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_npu_tp.models.families import common
from lightning_npu_tp.models.layers.linear import ShardedMLP
from lightning_npu_tp.models.moe.block import MoEBlock
from lightning_npu_tp.parallel.plan import Plan, Replicated
from lightning_npu_tp.parallel.tensor_region import Region


class GatedExpert(nn.Module):
    """sigmoid(x w) * expert(x), as this rank's partial sum.

    expert: an MLP that returns partial sums. gate: holder of w, [1, D], replicated.
    """

    def __init__(self, expert: ShardedMLP, gate: Any, region: Region) -> None:
        super().__init__()
        self.expert = expert
        self.gate = gate
        self.region = region

    @property
    def down_proj(self) -> nn.Module:
        """The expert's row-split projection, which makes the output a partial sum."""
        return self.expert.down_proj

    @override
    def forward(self, entered_BSD: Tensor) -> Tensor:
        """entered_BSD: [B, S, D], has entered the region; returns the same shape, partial."""
        # Inside, as each rank's gate sees the gradient of its own part of the expert.
        gate_BS1 = F.linear(entered_BSD, self.region.weight_inside(self.gate)).sigmoid()
        return gate_BS1 * self.expert(entered_BSD)


class GatedSharedBlock(MoEBlock):
    """A block whose shared expert and its gate are named as in Qwen2-MoE: shared_expert, shared_expert_gate."""

    @override
    def adopt_parameters(self, source: nn.Module) -> None:
        """Take over the parameters of router, routed experts and the gated shared expert of `source`."""
        super().adopt_parameters(source)
        self.shared_expert = ShardedMLP(source.get_submodule("shared_expert"), self.region, partial=True)
        self.shared_expert_gate = source.get_submodule("shared_expert_gate")
        # Not registered: its children are, above, under the names that checkpoints have.
        self.__dict__["shared_experts"] = GatedExpert(self.shared_expert, self.shared_expert_gate, self.region)


def plan(config: Any) -> Plan:
    """Sharding plan of a Qwen2MoeForCausalLM with this config."""
    sparse = QWEN2_MOE.num_sparse_layers(config)
    rules = common.frame_rules() | common.grouped_query_rules(input_bias=config.qkv_bias)
    rules |= common.feed_forward_rules(config, sparse, shared="*.mlp.shared_expert")
    if sparse:
        rules["*.mlp.shared_expert_gate.weight"] = Replicated(why="one number per token")
    return rules


QWEN2_MOE = common.decoder_family(
    "Qwen2Moe",
    common.grouped_attention,
    moe=partial(common.plain_moe_block, make=GatedSharedBlock),
    name="qwen2_moe",
    plan=plan,
    experts="num_experts",
    sparse_layers=common.layers_by_step,
    dense_first=common.settings_by_step,
    models="Qwen1.5-MoE, Qwen2-57B-A14B",
    refused="a sliding window",
)
