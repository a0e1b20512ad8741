"""The routed experts of one rank: stacked weights, and the arithmetic on the rows that come to them.

Only arithmetic: which picks are this rank's was decided before (`PickRows`), and partial sums are
reduced by the owner. The device's kernels compute; where they have a fused function for the whole it
is used, else it is composed of two grouped matmuls.

Axes: T tokens, K picks per token, R rows, D hidden, F expert width, E this rank's experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from typing_extensions import override

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.kernels import Kernels
from lightning_npu_tp.kernels.grouped import grouped_matmul
from lightning_npu_tp.kernels.rows import PickRows
from lightning_npu_tp.parallel.tensor_region import tensor_part


class _DividedGradient(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, weight: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return weight.view_as(weight)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # In place: the kernel has just made it, and it is as large as the experts.
        return grad.div_(ctx.divisor), None


class RoutedExperts(nn.Module):
    """The experts of one rank; each computes down(act(gate(x)) * up(x)).

    gate_up_proj: [E, 2F, D], gate over up; down_proj: [E, D, F]. Names as in transformers; a DTensor of
    global shape, split over the experts, serves as well.
    num_local: E.
    gradient_divisor: by what the weights' gradients are divided: the data ranks whose tokens these experts
        see at once, where gradients are averaged over data ranks.
    Raises ConfigError for an unknown activation.
    """

    def __init__(
        self, *, hidden_size: int, expert_width: int, num_local_experts: int, kernels: Kernels, hidden_act: str = "silu"
    ) -> None:
        super().__init__()
        if hidden_act not in ACT2FN:
            raise ConfigError(f"hidden_act={hidden_act!r} is unknown. Use one of {sorted(ACT2FN)}.")
        self.gate_up_proj = nn.Parameter(torch.empty(num_local_experts, 2 * expert_width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_local_experts, hidden_size, expert_width))
        # A number of its own: data parallelism holds slices of the weights between forwards.
        self.num_local = num_local_experts
        self.gradient_divisor = 1
        self.act_fn = ACT2FN[hidden_act]
        self.kernels = kernels
        self._fused = kernels.expert_mlp if hidden_act == "silu" else None
        self._swiglu = kernels.swiglu if hidden_act == "silu" else None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw both weights of all local experts from a normal distribution."""
        nn.init.normal_(self.gate_up_proj, std=std)
        nn.init.normal_(self.down_proj, std=std)

    @override
    def forward(self, x_TD: Tensor, weights_TK: Tensor, rows: PickRows) -> Tensor:
        """Sum over each token's local picks of weight * expert(token).

        x_TD: [T, D]. weights_TK: [T, K], at least float32. Computes in autocast's dtype where autocast
        is on, else in the dtype of the parameters. Returns [T, D] in the dtype of `x_TD`.
        Gradient: this rank's part for tokens and weights; complete for the experts.
        """
        gate_up_E2FD, down_EDF = tensor_part(self.gate_up_proj), tensor_part(self.down_proj)
        if self.gradient_divisor > 1:
            gate_up_E2FD = _DividedGradient.apply(gate_up_E2FD, self.gradient_divisor)
            down_EDF = _DividedGradient.apply(down_EDF, self.gradient_divisor)
        device_type = x_TD.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else gate_up_E2FD.dtype
        with torch.autocast(device_type, enabled=False):
            compute = self._fused or self._composed
            return compute(x_TD.to(dtype), weights_TK, rows, gate_up_E2FD, down_EDF).to(x_TD.dtype)

    def _composed(
        self, x_TD: Tensor, weights_TK: Tensor, rows: PickRows, gate_up_E2FD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        primitives, dtype = self.kernels.grouped, x_TD.dtype
        x_RD = self.kernels.permute.tokens_to_rows(x_TD, rows)
        hidden_RF = self._gated(grouped_matmul(x_RD, gate_up_E2FD.to(dtype), rows.groups, primitives))
        # The product has no name here: it would outlive its use by a copy and by the result.
        return self.kernels.permute.rows_to_tokens(
            grouped_matmul(hidden_RF, down_EDF.to(dtype), rows.groups, primitives), weights_TK, rows
        )

    def _gated(self, gate_up_RG: Tensor) -> Tensor:
        if self._swiglu is not None:
            return self._swiglu(gate_up_RG)
        gate_RF, up_RF = gate_up_RG.chunk(2, dim=-1)
        return self.act_fn(gate_RF) * up_RF

    @override
    def extra_repr(self) -> str:
        """The sizes that print(model) shows of the experts."""
        num_experts, hidden_size, expert_width = self.down_proj.shape
        return f"num_experts={num_experts}, hidden_size={hidden_size}, expert_width={expert_width}"
