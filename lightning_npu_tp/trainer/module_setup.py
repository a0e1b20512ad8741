"""What the strategy does to a user's module around conversion: refuse, share, connect, check.

Each function handles one thing that goes wrong silently when a LightningModule with plain layers,
metrics and any optimizer meets sharded parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.experimental import register_sharding
from torch.optim import Adam, AdamW, Optimizer
from torchmetrics import Metric

from lightning_npu_tp.errors import ConfigError, ConversionError
from lightning_npu_tp.parallel.layout import Groups
from lightning_npu_tp.trainer.data_mean import DataSync


def refuse_fsdp1(module: nn.Module) -> None:
    """Raise ConversionError for a module that is sharded already, in a way that cannot be combined."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for name, child in module.named_modules():
        if isinstance(child, FullyShardedDataParallel):
            raise ConversionError(
                f"The module {name!r} is wrapped in FullyShardedDataParallel (FSDP1), which cannot be combined with "
                f"tensor parallelism. Leave it unwrapped: this strategy shards it."
            )


def plain_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of layers that conversion left alone; every rank holds them whole."""
    return [parameter for parameter in module.parameters() if not isinstance(parameter, DTensor)]


def share_plain_tensors(module: nn.Module, device: torch.device) -> None:
    """Give every rank rank 0's plain parameters and buffers; random layers differ from rank to rank.

    device: where the backend communicates. Collective over all ranks.
    """
    buffers = [buffer for buffer in module.buffers() if not isinstance(buffer, DTensor)]
    for tensor in [*plain_parameters(module), *buffers]:
        shared = tensor.detach().to(device, copy=True)
        dist.broadcast(shared, src=0)
        tensor.detach().copy_(shared)


def count_samples_once(module: nn.Module, groups: Groups) -> None:
    """Let the module's torchmetrics gather one state per data rank, unless they sync in their own way."""
    for metric in module.modules():
        if isinstance(metric, Metric) and metric.dist_sync_fn is None:
            metric.dist_sync_fn = DataSync(groups)


# On Ascend the fused kernels loop over the parameters, and for-each, the default there, does not.
_FUSED_DEVICES = ("cpu", "cuda")
# Those whose fused kernel DTensor knows.
_FUSED_OPTIMIZERS = (Adam, AdamW)


def choose_implementations(optimizers: Sequence[Optimizer], plain: Sequence[nn.Parameter], device_type: str) -> None:
    """Where the user left it open, choose how each parameter group is updated; call before the first step.

    plain: parameters that are no DTensors. A group of both kinds is updated in a loop, since torch's
    fused and for-each updates take one kind only. A sharded group is updated by the fused kernel: one call
    instead of a DTensor dispatch for each of a dozen operations on each parameter.

    Raises ConfigError where the user asked for an update that a mixed group cannot have.
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
            if len(kinds) > 1 and "foreach" in group:
                group["foreach"] = False
            open_choice = group.get("fused") is None and group.get("foreach") is None
            if kinds == {False} and open_choice and not group.get("differentiable"):
                if device_type in _FUSED_DEVICES and isinstance(optimizer, _FUSED_OPTIMIZERS):
                    group["fused"] = True


def warn_of_eval_mode(module: nn.Module) -> None:
    """Warn of mixtures that are trained in eval mode, as `from_pretrained` leaves a model and Lightning keeps it."""
    blocks = ((name, child) for name, child in module.named_modules() if hasattr(child, "pending_tokens_per_expert"))
    asleep = [name for name, child in blocks if not child.training and any(p.requires_grad for p in child.parameters())]
    if asleep:
        rank_zero_warn(
            f"{asleep[0]}{f' and {len(asleep) - 1} more mixtures are' if len(asleep) > 1 else ' is'} in eval mode, as "
            f"from_pretrained leaves a model: trained without balance losses, without counts of the experts' tokens "
            f"and without dropout. Call model.train() after from_pretrained."
        )


def averaging_callbacks(trainer: Trainer) -> list[Callback]:
    """Lightning's callbacks that keep an average of the weights.

    They copy the module in their `setup`, which comes before `configure_model` and before any strategy:
    a copy without weights averages nothing, and one on the meta device cannot be moved.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, (StochasticWeightAveraging, WeightAveraging))]


def configure_early(trainer: Trainer, module: LightningModule) -> None:
    """Run `configure_model` before the callbacks' `setup`; it has to bear being called again by contract."""
    strategy = trainer.strategy
    with strategy.tensor_init_context(), strategy.precision_plugin.module_init_context():
        module.configure_model()


@cache
def let_anomaly_detection_read_shards() -> None:
    """Teach DTensor the one operator of torch's anomaly detection that it does not know.

    It asks of every gradient whether any element is NaN; a sharded gradient is gathered for it, which
    is slow and right. Registered only when detect_anomaly is on.
    """

    @register_sharding(torch.ops.aten._is_any_true.default)
    def is_any_true(flags):  # type: ignore[no-untyped-def]
        return [([Replicate()], [Replicate()])]
