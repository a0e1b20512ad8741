"""Which optimizers can update sharded parameters, and by which of their implementations.

Most of torch's go element by element, and DTensor applies them to each rank's part. Those that look at a whole
parameter, or at all of them at once, mostly fail in their first step, with an error about placements; here they are
refused before training. What works and what not is a table in docs/own-models.md, which a test holds against this.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Replicate
from torch.optim import ASGD, LBFGS, SGD, Adafactor, Adagrad, Adam, AdamW, Optimizer, Rprop, SparseAdam

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.optim import AdamWBF16

# On Ascend the fused kernels loop over the parameters, and for-each, the default there, does not.
_FUSED_DEVICES = ("cpu", "cuda")
# Those whose fused kernel DTensor knows.
_FUSED_OPTIMIZERS = (Adam, AdamW)
_NOT_FUSED = (SGD, Adagrad)
_FACTORS = "its factors are means over rows and columns of whole matrices, which DTensor cannot write in place"


def refuse_optimizers(optimizers: Sequence[Optimizer], precision: str = "") -> None:
    """Raise ConfigError for an optimizer that cannot update its parameters as one process would.

    precision: Lightning's name of the run's; an optimizer may be made for others only.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, AdamWBF16) and precision.endswith("-mixed"):
            raise ConfigError(
                f"AdamWBF16 keeps the lost bits of bfloat16 weights, and trainer.precision={precision} keeps the "
                f"weights in float32. Use torch.optim.AdamW (optimizer=adamw), or set trainer.precision to bf16-true."
            )
        reason = _why_not(optimizer, [p for group in optimizer.param_groups for p in group["params"]])
        if reason is not None:
            raise ConfigError(
                f"{type(optimizer).__name__} from configure_optimizers cannot train sharded parameters: {reason}. Use "
                f"an optimizer that goes element by element, such as AdamW; docs/own-models.md lists them."
            )


def _why_not(optimizer: Optimizer, parameters: Sequence[Tensor]) -> str | None:
    sharded = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    # Only one who has imported it can have made one.
    others = getattr(sys.modules.get("transformers.optimization"), "Adafactor", Adafactor)
    if isinstance(optimizer, (Adafactor, others)):
        return _FACTORS
    if isinstance(optimizer, Rprop):
        return "it picks elements by a mask, of which DTensor does not know the number"
    if isinstance(optimizer, SparseAdam):
        return "it takes sparse gradients, and those of the embedding are dense"
    if isinstance(optimizer, LBFGS):
        if len({parameter.device_mesh for parameter in sharded}) + (len(sharded) < len(parameters)) > 1:
            return "it joins all parameters into one vector, and experts, or layers of your own, lie on other ranks"
        if any(map(_is_uneven, sharded)):
            return "it joins all parameters into one vector, and some are divided unevenly"
    # torch has it since 2.9.
    if isinstance(optimizer, getattr(torch.optim, "Muon", ())) and any(map(_is_divided, sharded)):
        return "it orthogonalises whole matrices in bfloat16, and parts of a sum round otherwise than the whole"
    return None


def _is_divided(parameter: DTensor) -> bool:
    sizes = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    return any(size > 1 and not isinstance(placement, Replicate) for placement, size in sizes)


def _is_uneven(parameter: DTensor) -> bool:
    sizes: Any = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    cut = [placement.dim for placement, size in sizes if size > 1 and not isinstance(placement, Replicate)]
    return any(parameter.shape[dim] % parameter.device_mesh.size() for dim in cut)


def choose_implementations(optimizers: Sequence[Optimizer], plain: Sequence[nn.Parameter], device_type: str) -> None:
    """Where the user left it open, choose how each parameter group is updated; call before the first step.

    plain: parameters that are no DTensors. A group of both kinds is updated in a loop, since torch's
    fused and for-each updates take one kind only. A sharded group is updated by the fused kernel: one call
    instead of a DTensor dispatch for each of a dozen operations on each parameter.

    Raises ConfigError where the user asked for an update that a group cannot have.
    """
    ids = {id(parameter) for parameter in plain}
    for optimizer in optimizers:
        for number, group in enumerate(optimizer.param_groups):
            kinds = {id(parameter) in ids for parameter in group["params"]}
            chosen = [option for option in ("fused", "foreach") if group.get(option)]
            if len(kinds) > 1 and chosen:
                raise ConfigError(
                    f"{chosen[0]}=True in parameter group {number} of {type(optimizer).__name__} cannot update sharded "
                    f"and unsharded parameters together. Put the parameters of your own layers into a parameter group "
                    f"of their own, or leave {chosen[0]} unset."
                )
            _refuse_option(optimizer, number, group)
            takes_a_loop = len(kinds) > 1 or (isinstance(optimizer, ASGD) and False in kinds)
            if takes_a_loop and "foreach" in group:
                group["foreach"] = False
            open_choice = group.get("fused") is None and group.get("foreach") is None
            if kinds == {False} and open_choice and not group.get("differentiable"):
                if device_type in _FUSED_DEVICES and isinstance(optimizer, _FUSED_OPTIMIZERS):
                    group["fused"] = True


def _refuse_option(optimizer: Optimizer, number: int, group: dict[str, Any]) -> None:
    """Raise ConfigError for an implementation of this optimizer that DTensor does not know."""
    meshes = {parameter.device_mesh for parameter in group["params"] if isinstance(parameter, DTensor)}
    option, reason = "", ""
    if meshes and group.get("fused") and isinstance(optimizer, _NOT_FUSED):
        option, reason = "fused", "DTensor knows the fused kernels of Adam and AdamW only"
    elif len(meshes) > 1 and group.get("foreach") and isinstance(optimizer, ASGD):
        option, reason = "foreach", "it takes parameters of one mesh, and the experts have their own"
    if option:
        raise ConfigError(
            f"{option}=True in parameter group {number} of {type(optimizer).__name__} cannot update sharded "
            f"parameters: {reason}. Leave {option} unset."
        )
