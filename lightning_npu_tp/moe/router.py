"""The router: which experts each token goes to, and how much each counts. No communication.

Scoring (logits to scores), choosing (which experts may be picked) and weighing (scores of the picked
to weights) are apart, so that another model family can exchange one. Everything is computed in at
least float32, under autocast too: a router's near-ties are decided by small differences. Shapes are
static and nothing is read on the host.

Axes: T tokens, K picks per token, E experts (global), G groups of experts, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.layers.linear import local
from lightning_npu_tp.layout import divisors

TOPK_METHODS = ("greedy", "group_limited_greedy")


@dataclass(frozen=True)
class Routing:
    """The router's answer, in at least float32.

    weights_TK: weight of each pick. experts_TK: int64, global ids of the experts picked.
    scores_TE:  score of each expert, before any was excluded: what the balance losses look at.
    """

    weights_TK: Tensor
    experts_TK: Tensor
    scores_TE: Tensor


def limit_to_groups(scores_TE: Tensor, *, num_groups: int, topk_group: int) -> Tensor:
    """Set to zero the scores outside of each token's best `topk_group` of `num_groups` groups.

    A group is a run of E / num_groups experts and is as good as its best expert. Returns [T, E].
    Gradient: of the scores that stay.
    Source: group-limited greedy routing of arXiv:2405.04434, section 2.2.2.
    """
    grouped_TGX = scores_TE.unflatten(1, (num_groups, -1))
    best_TG = grouped_TGX.detach().amax(dim=2)
    chosen_Tg = torch.topk(best_TG, k=topk_group, dim=1, sorted=False).indices
    allowed_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter(1, chosen_Tg, True)
    return grouped_TGX.masked_fill(~allowed_TG.unsqueeze(2), 0.0).flatten(1)


class TopKRouter(nn.Module):
    """Softmax router of DeepSeek-V2 with greedy or group-limited choice.

    weight: [E, D], replicated; named as in transformers.

    norm_topk_prob with top_k > 1 makes the weights of a token sum to one and leaves the scaling
    factor out, as the model's authors do in the code that they publish with the checkpoint;
    transformers reads the setting and ignores it. Otherwise weights are multiplied by
    `routed_scaling_factor`.

    Raises ConfigError for sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        topk_method: str = "greedy",
        num_groups: int = 1,
        topk_group: int = 1,
        norm_topk_prob: bool = False,
        routed_scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ConfigError(f"top_k={top_k} experts per token cannot be picked out of {num_experts} experts.")
        if topk_method not in TOPK_METHODS:
            raise ConfigError(f"topk_method={topk_method!r} is not supported. Use one of {list(TOPK_METHODS)}.")
        if topk_method == "group_limited_greedy":
            if num_groups not in divisors(num_experts):
                raise ConfigError(
                    f"num_groups={num_groups} (n_group) does not divide the {num_experts} experts. "
                    f"Use one of {divisors(num_experts)}."
                )
            if not 1 <= topk_group <= num_groups:
                raise ConfigError(f"topk_group={topk_group} groups cannot be chosen out of num_groups={num_groups}.")
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.top_k = top_k
        self.topk_method = topk_method
        self.num_groups = num_groups
        self.topk_group = topk_group
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weights from a normal distribution."""
        nn.init.normal_(self.weight, std=std)

    def forward(self, x_TD: Tensor) -> Routing:
        """x_TD: [T, D]. Gradient: of weights and scores to the tokens and to `weight`."""
        weight_ED = local(self.weight)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.to(wide), weight_ED.to(wide))
            scores_TE = logits_TE.softmax(dim=-1)
            eligible_TE = scores_TE
            if self.topk_method == "group_limited_greedy":
                eligible_TE = limit_to_groups(scores_TE, num_groups=self.num_groups, topk_group=self.topk_group)
            weights_TK, experts_TK = torch.topk(eligible_TE, k=self.top_k, dim=-1, sorted=False)
            return Routing(self._weigh(weights_TK), experts_TK, scores_TE)

    def _weigh(self, picked_TK: Tensor) -> Tensor:
        if self.norm_topk_prob and self.top_k > 1:
            return picked_TK / (picked_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return picked_TK * self.routed_scaling_factor

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        num_experts, hidden_size = self.weight.shape
        return f"hidden_size={hidden_size}, num_experts={num_experts}, top_k={self.top_k}, method={self.topk_method}"
