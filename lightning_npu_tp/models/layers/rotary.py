"""Rotary position embedding with cosines and sines instead of complex numbers: the tables.

The kernels (kernels/plain.py) rotate by them.

Ascend has no complex kernels, and a complex buffer costs a copy everywhere else. The frequencies
(default, linear, YaRN, llama3 scaling) come from transformers' own functions, so that both agree to the last bit.
Source: arXiv:2104.09864 (RoPE), arXiv:2309.00071 (YaRN).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from typing_extensions import override

from lightning_npu_tp.errors import ConversionError

_LENGTH_DEPENDENT = ("dynamic", "longrope")


def check_rope_type(config: Any) -> None:
    """Raise ConversionError for frequencies that are not the same in every step."""
    rope_type = config.rope_parameters["rope_type"]
    if rope_type in _LENGTH_DEPENDENT:
        raise ConversionError(
            f"rope_type={rope_type!r} changes its frequencies with the sequence length, which needs a host sync "
            f"per step. Use one of {sorted(set(ROPE_INIT_FUNCTIONS) - set(_LENGTH_DEPENDENT) | {'default'})}."
        )


class RotaryTables(nn.Module):
    """Cosines and sines for the positions of one batch, shared by all layers.

    Replaces a transformers rotary module. Frequencies are kept as numbers and not as a buffer: a
    buffer would be cast by `.to(bfloat16)` (positions beyond 256 would then collide) and lost on
    the meta device.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        check_rope_type(source.config)
        self.frequencies, self.scaling = _frequencies(source)
        self._on_device: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @override
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """x: only its dtype and device count. position_ids: [B, S].

        Returns (cos, sin), each [B, S, R/2] in at least float32.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        key = (x.device, wide)
        if key not in self._on_device:
            self._on_device[key] = torch.tensor(self.frequencies, dtype=wide, device=x.device)
        frequencies = self._on_device[key]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            angles = position_ids[..., None].to(wide) * frequencies
            return angles.cos() * self.scaling, angles.sin() * self.scaling


def _frequencies(source: Any) -> tuple[list[float], float]:
    """Inverse frequencies and cosine scaling of a transformers rotary module.

    Its own buffer where that has values of full precision; else (meta device, bfloat16) anew.
    """
    config = source.config
    rope_type = config.rope_parameters["rope_type"]
    if rope_type == "default":
        frequencies, scaling = source.compute_default_rope_parameters(config)
    else:
        frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](config)
    buffer = source.inv_freq
    if not buffer.is_meta and buffer.dtype in (torch.float32, torch.float64):
        frequencies = buffer
    return frequencies.detach().cpu().double().tolist(), float(scaling)
