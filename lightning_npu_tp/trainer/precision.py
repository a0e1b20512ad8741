"""Lightning's precision plugins, made right for the device and for sharded gradients.

The Trainer builds them before it asks anybody: mixed precision for "cuda" whatever an outside
accelerator is (the matmuls then run in float32), a gradient scaler that each rank heeds alone, and
clipping that refuses DTensors beside plain tensors. `rebuild_precision` turns what it built into
what is needed, with the same meaning; the strategy calls it. How gradients are clipped is
clipping.py's part, what a device can compute device.py's.

The classes bear the names of Lightning's: a checkpoint stores the scaler under the class's name,
and one written with the stock plugin must be found again.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.plugins import precision as stock
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_npu_tp.devices.device import supported_precisions
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.parallel.clipping import clip_grad_norm_, clip_grad_value_, local_gradients


class AgreedGradScaler(torch.amp.GradScaler):
    """A gradient scaler whose ranks skip the same steps: one rank's overflow is everybody's.

    Takes DTensor and plain gradients. Unscaling is collective over all ranks once torch.distributed is
    initialised, so every rank must step, one without gradients too.
    """

    @override
    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        gradients: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        for group in optimizer.param_groups:
            for gradient in local_gradients(group["params"]):
                gradients[gradient.dtype].append(gradient)
        if torch.float16 in gradients and not allow_fp16:
            raise ConfigError(
                "precision=16-mixed scales gradients of float32 parameters, but there are float16 ones. Keep the "
                "model in float32, or set trainer.precision to 16-true or bf16-true."
            )
        for same in gradients.values():
            torch._amp_foreach_non_finite_check_and_unscale_(same, found_inf, inv_scale)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
        return {found_inf.device: found_inf}


class ShardedClipping(stock.Precision):
    """Clips DTensor and plain gradients together; derive a precision plugin of your own from it as well.

    grad_norm: of all gradients together before the last clipping by norm, a scalar on the device; None before.
    """

    grad_norm: Tensor | None = None

    @override
    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clamp every gradient element of the optimizer to [-clip_val, clip_val]."""
        clip_grad_value_(self.main_params(optimizer), clip_val)

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """Scale the optimizer's gradients so that their norm over all ranks is at most clip_val."""
        self.grad_norm = clip_grad_norm_(self.main_params(optimizer), clip_val)


class Precision(ShardedClipping):
    """Lightning's precision 32-true, with clipping of sharded gradients."""


class HalfPrecision(ShardedClipping, stock.HalfPrecision):
    """Lightning's precisions bf16-true and 16-true, with clipping of sharded gradients."""


class DoublePrecision(ShardedClipping, stock.DoublePrecision):
    """Lightning's precision 64-true, with clipping of sharded gradients."""


class MixedPrecision(ShardedClipping, stock.MixedPrecision):
    """bf16-mixed or 16-mixed: float32 parameters, matmuls in 16 bits on `device`.

    scaler: for 16-mixed; by default a new AgreedGradScaler of the device type.
    """

    def __init__(
        self,
        precision: Literal["16-mixed", "bf16-mixed"],
        device: str,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if precision == "16-mixed" and scaler is None:
            scaler = AgreedGradScaler(device)
        super().__init__(precision, device, scaler)


def rebuild_precision(plugin: stock.Precision, device_type: str) -> stock.Precision:
    """The plugin of the same precision that is right for the device and for sharded gradients.

    plugin: what the Trainer built or the user passed. One that is right already comes back as it is,
    and so does a subclass of `ShardedClipping`. A scaler's settings are kept, its state is not.
    Raises ConfigError for a precision that the device lacks and for a plugin that cannot be rebuilt.
    """
    name = _name(plugin)
    supported = supported_precisions(device_type)
    if name not in supported:
        raise ConfigError(
            f"trainer.precision={name} does not work on {device_type}. Set trainer.precision to one of {supported}."
        )
    if isinstance(plugin, stock.MixedPrecision):
        if isinstance(plugin, ShardedClipping) and plugin.device == device_type:
            return plugin
        if type(plugin) in (stock.MixedPrecision, MixedPrecision):
            scaler = _rebuild_scaler(plugin.scaler, device_type) if plugin.scaler is not None else None
            precision: Literal["16-mixed", "bf16-mixed"] = "16-mixed" if name == "16-mixed" else "bf16-mixed"
            return MixedPrecision(precision, device_type, scaler)
    if isinstance(plugin, ShardedClipping):
        return plugin
    if type(plugin) is stock.Precision:
        return Precision()
    if type(plugin) is stock.HalfPrecision:
        return HalfPrecision(plugin.precision)
    if type(plugin) is stock.DoublePrecision:
        return DoublePrecision()
    raise ConfigError(
        f"the precision plugin {type(plugin).__qualname__} is not made for sharded parameters on {device_type}. Set "
        f"trainer.precision to one of {supported} instead, or derive the plugin from "
        f"lightning_npu_tp.ShardedClipping and give it the device {device_type!r}."
    )


def precision_dtype(plugin: stock.Precision) -> torch.dtype:
    """Data type of the parameters under this plugin; mixed precision keeps them in float32."""
    name = _name(plugin)
    return {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(name, torch.float32)


def _name(plugin: stock.Precision) -> str:
    # Lightning's base class calls itself "32-true", subclasses carry what they were given.
    return str(plugin.precision)


def _rebuild_scaler(scaler: torch.amp.GradScaler, device_type: str) -> AgreedGradScaler:
    # A scaler made for an absent CUDA device has switched itself off and kept no settings.
    settings: dict[str, Any] = {}
    if scaler.is_enabled():
        settings = {
            "init_scale": scaler.get_scale(),
            "growth_factor": scaler.get_growth_factor(),
            "backoff_factor": scaler.get_backoff_factor(),
            "growth_interval": scaler.get_growth_interval(),
        }
    return AgreedGradScaler(device_type, **settings)
