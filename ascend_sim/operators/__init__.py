"""Reference kernels of torch_npu's own operators (`npu::…`) for the simulated card.

torch_npu brings the schemas, the autograd formulas and the Python names; what a card would compute is
computed here, below autograd, so that the formulas of the real wheel are what runs. One file per operator:
a function that computes, on tensors of any device and in float64 too, so that it can be checked against an
independent formula; and one that refuses what the documentation of torch_npu 2.13.0 and of CANN refuses.
Results that a card leaves uninitialised are NaN here, so that whoever reads them sees it.

Not here: operators of other names (they fail as on a CANN without them), the rounding and speed of the chip.
"""

from __future__ import annotations

from ascend_sim.operators import attention, grouped, memory, norm, permute, rotary, swiglu
from ascend_sim.operators.kernel import Kernel, install

KERNELS: tuple[Kernel, ...] = (
    *memory.KERNELS,
    *norm.KERNELS,
    *swiglu.KERNELS,
    *rotary.KERNELS,
    *grouped.KERNELS,
    *permute.KERNELS,
    *attention.KERNELS,
)


def register() -> None:
    """Give the simulated card these kernels; call it once torch_npu is imported. Twice is once."""
    install(KERNELS)
