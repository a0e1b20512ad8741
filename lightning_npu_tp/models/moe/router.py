"""The router: which experts each token goes to, and how much each counts. No communication.

Scoring (logits to scores), choosing (which experts may be picked) and weighing (scores of the picked
to weights) are apart, so that a model family exchanges one by one keyword. Everything is computed in at
least float32, under autocast too: a router's near-ties are decided by small differences. Shapes are
static and nothing is read on the host.

Axes: T tokens, K picks per token, E experts (global), G groups of experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.parallel.layout import divisors
from lightning_npu_tp.parallel.tensor_region import tensor_part

TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
SCORINGS = ("softmax", "sigmoid")
NORMALISATIONS = ("v2", "v3", "plain")


@dataclass(frozen=True)
class Routing:
    """The router's answer, in at least float32.

    weights_TK: weight of each pick. experts_TK: int64, global ids of the experts picked.
    scores_TE:  score of each expert, before a bias was added or any was excluded.
    logits_TE:  what the scores were made of; for the z-loss.
    sums_to_one: whether the scores of a token do (softmax), or each stands for itself (sigmoid).
    """

    weights_TK: Tensor
    experts_TK: Tensor
    scores_TE: Tensor
    logits_TE: Tensor
    sums_to_one: bool = True

    @property
    def shares_TE(self) -> Tensor:
        """Scores divided by their sum over the experts: what the balance losses look at.

        Source: equation 19 of arXiv:2412.19437 for sigmoid scores; softmax scores are shares already.
        """
        return self.scores_TE if self.sums_to_one else self.scores_TE / self.scores_TE.sum(dim=-1, keepdim=True)


def limit_to_groups(
    scores_TE: Tensor, *, num_groups: int, topk_group: int, num_best: int = 1, fill: float = 0.0
) -> Tensor:
    """Set to `fill` the scores outside of each token's best `topk_group` of `num_groups` groups.

    A group is a run of E / num_groups experts and is as good as its `num_best` best experts together.
    Returns [T, E]. Gradient: of the scores that stay.
    Source: group-limited greedy routing of arXiv:2405.04434, section 2.2.2 (num_best=1), and
    node-limited routing of arXiv:2412.19437, section 2.1.2 (num_best=2).
    """
    grouped_TGX = scores_TE.unflatten(1, (num_groups, -1))
    best_TG = torch.topk(grouped_TGX.detach(), k=num_best, dim=2).values.sum(dim=2)
    chosen_Tg = torch.topk(best_TG, k=topk_group, dim=1).indices
    allowed_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter(1, chosen_Tg, True)
    return grouped_TGX.masked_fill(~allowed_TG.unsqueeze(2), fill).flatten(1)


class TopKRouter(nn.Module):
    """Scores every expert for every token, picks `top_k` of them and weighs them.

    weight: [E, D], replicated; named as in transformers.
    e_score_correction_bias: [E], at least float32, a persistent buffer that only moves the choice; None
        without `selection_bias`. No gradient: see `lightning_npu_tp.models.moe.bias`.

    scoring:       "softmax" over all experts, or "sigmoid" of each.
    topk_method:   "greedy"; "group_limited_greedy": only experts of the token's best `topk_group` of
                   `num_groups` groups, each as good as its best expert; "noaux_tc": the same with groups
                   as good as their two best, and always with a selection bias.
    selection_bias: choose by score + bias; the weights stay those of the scores.
    norm_topk_prob: divide a token's weights by their sum, in the way that `normalisation` says.
    normalisation: "v2": sum + 1e-20; the scaling factor is then left out, and a single pick is not
                   normalised, as in the code that DeepSeek-V2's authors publish with the checkpoint
                   (transformers reads the setting and ignores it). "v3": sum + 1e-20, then scaled
                   (DeepSeek-V3). "plain": the sum, then scaled (Mixtral, which has norm_topk_prob
                   always; Qwen2-MoE, Qwen3-MoE, OLMoE).
    routed_scaling_factor: multiplies the weights, but for "v2" normalised ones.

    Raises ConfigError for settings that do not fit each other.
    """

    e_score_correction_bias: Tensor | None

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
        scoring: str = "softmax",
        normalisation: str = "v2",
        selection_bias: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ConfigError(f"top_k={top_k} experts per token cannot be picked out of {num_experts} experts.")
        _check_one_of("topk_method", topk_method, TOPK_METHODS)
        _check_one_of("scoring", scoring, SCORINGS)
        _check_one_of("normalisation", normalisation, NORMALISATIONS)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.top_k = top_k
        self.topk_method = topk_method
        self.num_groups = num_groups
        self.topk_group = topk_group
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.scoring = scoring
        self.normalisation = normalisation
        bias_E = torch.zeros(num_experts) if selection_bias or topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias_E)
        self._num_best = 2 if topk_method == "noaux_tc" else 1
        self._weigh_allowed_only = False
        if topk_method != "greedy":
            self._check_groups(num_experts)
        self.reset_parameters()

    def _check_groups(self, num_experts: int) -> None:
        if self.num_groups not in divisors(num_experts):
            raise ConfigError(
                f"num_groups={self.num_groups} (n_group) does not divide the {num_experts} experts. "
                f"Use one of {divisors(num_experts)}."
            )
        if not 1 <= self.topk_group <= self.num_groups:
            raise ConfigError(
                f"topk_group={self.topk_group} groups cannot be chosen out of num_groups={self.num_groups}."
            )
        group_size = num_experts // self.num_groups
        if group_size < self._num_best:
            raise ConfigError(
                f"num_groups={self.num_groups} (n_group) leaves {group_size} of the {num_experts} experts in a group, "
                f"but topk_method={self.topk_method} ranks groups by their {self._num_best} best. "
                f"Use one of {[number for number in divisors(num_experts) if num_experts // number >= self._num_best]}."
            )
        # Some picks must then fall on experts that were excluded; theirs is the weight zero.
        self._weigh_allowed_only = self.top_k > self.topk_group * group_size
        if self._weigh_allowed_only and self.e_score_correction_bias is not None:
            raise ConfigError(
                f"top_k={self.top_k} experts per token cannot be picked out of topk_group={self.topk_group} groups of "
                f"{group_size} experts. Set topk_group to at least {-(-self.top_k // group_size)}, or lower top_k."
            )

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weights from a normal distribution; no expert is favoured."""
        nn.init.normal_(self.weight, std=std)
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `.bfloat16()` and the like leave the bias in float32: its steps of 0.001 would be rounded away.
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if before is not None and after is not None and torch.finfo(after.dtype).bits < 32:
            self.e_score_correction_bias = before.to(after.device, torch.promote_types(before.dtype, torch.float32))
        return self

    @override
    def forward(self, x_TD: Tensor, experts_TK: Tensor | None = None, weight: Tensor | None = None) -> Routing:
        """Route tokens.

        x_TD:       [T, D], T may be 0.
        experts_TK: int64 [T, K], an earlier choice to be repeated when activations are recomputed: a
                    near-tie decided the other way would change what the backward pass looks at.
        weight:     local [E, D], instead of this module's own.
        Gradient: of weights, scores and logits to the tokens and to the weight.
        """
        weight_ED = tensor_part(self.weight) if weight is None else weight
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.to(wide), weight_ED.to(wide))
            scores_TE = logits_TE.sigmoid() if self.scoring == "sigmoid" else logits_TE.softmax(dim=-1)
            if experts_TK is None:
                experts_TK = self._choose(scores_TE.detach())
            eligible_TE = self._limit(scores_TE, fill=0.0) if self._weigh_allowed_only else scores_TE
            weights_TK = self._weigh(eligible_TE.gather(1, experts_TK))
        return Routing(weights_TK, experts_TK, scores_TE, logits_TE, sums_to_one=self.scoring == "softmax")

    def _choose(self, scores_TE: Tensor) -> Tensor:
        if self.e_score_correction_bias is not None:
            scores_TE = scores_TE + self.e_score_correction_bias.to(scores_TE.dtype)
        if self.topk_method != "greedy":
            # Not zero: a biased score may be below it.
            scores_TE = self._limit(scores_TE, fill=float("-inf"))
        # Ascend's topk has no sorted=False; here and above.
        return torch.topk(scores_TE, k=self.top_k, dim=-1).indices

    def _limit(self, scores_TE: Tensor, fill: float) -> Tensor:
        return limit_to_groups(
            scores_TE, num_groups=self.num_groups, topk_group=self.topk_group, num_best=self._num_best, fill=fill
        )

    def _weigh(self, picked_TK: Tensor) -> Tensor:
        if self.norm_topk_prob and self.normalisation == "v2":
            if self.top_k > 1:
                return picked_TK / (picked_TK.sum(dim=-1, keepdim=True) + 1e-20)
        elif self.norm_topk_prob:
            total_T1 = picked_TK.sum(dim=-1, keepdim=True)
            picked_TK = picked_TK / (total_T1 + 1e-20 if self.normalisation == "v3" else total_T1)
        return picked_TK * self.routed_scaling_factor

    @override
    def extra_repr(self) -> str:
        """The settings that print(model) shows of the router."""
        num_experts, hidden_size = self.weight.shape
        return (
            f"hidden_size={hidden_size}, num_experts={num_experts}, top_k={self.top_k}, scoring={self.scoring}, "
            f"method={self.topk_method}"
        )


def _check_one_of(setting: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{setting}={value!r} is not supported. Use one of {list(known)}.")
