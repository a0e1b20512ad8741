"""Optimizers for sharded parameters: plain torch, the same numbers in every layout, on every device.

AdamWBF16  AdamW over weights that live in bfloat16, with their exact float32 masters
"""

from typing import TYPE_CHECKING

from lightning_npu_tp.devices.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_npu_tp.optim.adamw_bf16 import AdamWBF16

__all__ = ["AdamWBF16"]

__getattr__, __dir__ = lazy_names(__name__, {"optim.adamw_bf16": "AdamWBF16"})
