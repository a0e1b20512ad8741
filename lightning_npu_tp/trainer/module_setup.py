"""What the strategy does to a user's module around conversion: refuse, share, connect, check.

Each function handles one thing that goes wrong silently when a LightningModule with plain layers,
metrics and any optimizer meets sharded parameters.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.experimental import register_sharding
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


def refuse_pruning(trainer: Trainer) -> None:
    """Raise ConfigError for Lightning's ModelPruning, which would mask other weights than in one process."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, ModelPruning):
            raise ConfigError(
                f"{type(callback).__name__} replaces each weight by a masked copy that it makes from the whole of it, "
                f"and the weights of this run are sharded. Leave the callback out, and prune the model that is "
                f"exported from a checkpoint (lightning-npu-tp export)."
            )


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


@cache
def let_equal_compare_shards() -> None:
    """Let `torch.equal` compare parameters of different meshes, and sharded ones with whole ones.

    DTensor refuses both. Lightning's finetuning callbacks ask it of all parameters, for which of them an optimizer has.
    Collective over all ranks, as DTensor's own; only tensors that are divided differently are gathered.
    """

    def equal(op_call: Any, args: tuple[Any, ...], kwargs: dict[str, object]) -> bool:
        left, right = args
        if left.shape != right.shape:
            return False
        if isinstance(left, DTensor) and isinstance(right, DTensor) and _divided_alike(left, right):
            same = torch.equal(left.to_local(), right.to_local())
        else:
            same = torch.equal(*(one.full_tensor() if isinstance(one, DTensor) else one for one in (left, right)))
        flag = torch.tensor(int(same), device=left.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag.item())

    DTensor._op_dispatcher._custom_op_handlers[torch.ops.aten.equal.default] = equal


def _divided_alike(left: DTensor, right: DTensor) -> bool:
    return left.device_mesh == right.device_mesh and left.placements == right.placements
