"""When an operator of torch_npu may be called, and one message when it may not.

The limits are those that torch_npu 2.13.0 and CANN document. Outside of them a kernel computes with the
reference and says so, once for each reason: slower is better than wrong, and silence would hide the slowness.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_npu_tp.devices.device import npu_has_float64

log = logging.getLogger(__name__)

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_said: set[tuple[str, str]] = set()


def fits(operation: str, limits: Iterable[tuple[bool, str]]) -> bool:
    """Whether all limits hold; logs the first that does not, the first time.

    operation: as in `strategy.kernels`. limits: (holds, what is wrong if not), evaluated in order.
    """
    for holds, reason in limits:
        if not holds:
            if (operation, reason) not in _said:
                _said.add((operation, reason))
                log.warning(
                    f"kernels.{operation}: {reason}; the reference computes instead, here and wherever this is so "
                    f"(said once). kernels.{operation}=reference chooses it throughout."
                )
            return False
    return True


def common_limits(*tensors: Tensor) -> Iterable[tuple[bool, str]]:
    """Limits of every operator: on the device, of a supported dtype, not empty."""
    for tensor in tensors:
        yield tensor.device.type == "npu", f"a tensor lies on {tensor.device.type}"
        known = tensor.dtype in FLOATS or (tensor.dtype == torch.float64 and npu_has_float64())
        yield known, f"{str(tensor.dtype).removeprefix('torch.')} is not supported"
        # Ranks without tokens; the fused operators refuse empty tensors or leave open what they do.
        yield tensor.numel() > 0, "a tensor without elements is not supported"


def forget() -> None:
    """Forget which warnings were given, so that tests see them again."""
    _said.clear()
