"""`Warmup`: communicators and operators are made before step 0, under long time-outs, and leave no trace.

The first collective of a group and the first run of an operator can take minutes on an NPU. In a
training step a peer's time-out may pass meanwhile. Here each group reduces one number, and the real
model runs forward and backward once on a small batch; then everything is put back: weights were not
touched, gradients, buffers, module modes and random generators are restored, and the data loaders'
position never moved, since the batch is made from the data set itself.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_npu_tp.devices.device import torch_module
from lightning_npu_tp.errors import ConfigError

log = logging.getLogger(__name__)


class Warmup(Callback):
    """Warms up before the first training step.

    batch_size: sequences of the warm-up batch.
    max_length: tokens per sequence at most; None takes the data's own length.
    tokens:     int64 [B, S] to use instead of the data set's first sequences, for data sets without an
                index. Labels are the tokens.
    timeout_s:  seconds a collective may take while it runs, if that is longer than the run's own.

    The model is the first transformers model inside the LightningModule. Raises ConfigError where
    there is none, or no batch can be made.
    """

    def __init__(
        self,
        batch_size: int = 1,
        max_length: int | None = None,
        tokens: Any = None,
        timeout_s: float = 7200.0,
    ) -> None:
        if batch_size < 1 or (max_length is not None and max_length < 2):
            raise ConfigError(
                f"Warmup(batch_size={batch_size}, max_length={max_length}) makes no batch to learn from. Set "
                f"warmup.batch_size to 1 or more and warmup.max_length to 2 or more, or null."
            )
        self.batch_size = batch_size
        self.max_length = max_length
        self.tokens = tokens
        self.timeout_s = timeout_s
        self.report = ""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run and report, in one line on rank 0."""
        device = pl_module.device
        groups = _groups(trainer)
        with _long_timeouts(groups, timedelta(seconds=self.timeout_s)), _untouched(pl_module, device):
            start = time.perf_counter()
            for group in groups:
                dist.all_reduce(torch.ones(1, device=device), group=group)
            torch_module(device.type).synchronize(device)
            connected = time.perf_counter()
            batch = trainer.strategy.batch_to_device(self._batch(trainer))
            _find_model(pl_module).train()
            with trainer.precision_plugin.forward_context():
                loss = _find_model(pl_module)(**batch).loss
            loss.backward()
            torch_module(device.type).synchronize(device)
            stop = time.perf_counter()
        shape = list(batch["input_ids"].shape)
        self.report = (
            f"warm-up: {len(groups)} communicators in {connected - start:.2f} s, forward and backward of {shape} "
            f"tokens in {stop - connected:.2f} s"
        )
        rank_zero_info(self.report)

    def _batch(self, trainer: Trainer) -> dict[str, Tensor]:
        """A batch like the training batches, cut to size, without asking a data loader's iterator."""
        if self.tokens is not None:
            tokens = torch.as_tensor(self.tokens)
            return {"input_ids": tokens, "labels": tokens}
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise ConfigError(
                "Warmup takes its batch from the training data set by index, which this data loader does not allow. "
                "Pass warmup.tokens, a list of lists of token ids, or set warmup=none."
            )
        dataset: Any = loader.dataset
        rows = [dataset[index % len(dataset)] for index in range(self.batch_size)]
        assert loader.collate_fn is not None
        batch = loader.collate_fn(rows)
        return {name: value[:, : self.max_length] for name, value in batch.items()}


def _find_model(pl_module: LightningModule) -> nn.Module:
    from transformers import PreTrainedModel

    for module in pl_module.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ConfigError(
        f"Warmup needs a transformers model inside {type(pl_module).__name__}, and there is none. Set warmup=none."
    )


def _groups(trainer: Trainer) -> list[dist.ProcessGroup]:
    """Every communicator of the run, each once: all ranks, then those of the strategy's meshes."""
    if not dist.is_available() or not dist.is_initialized():
        return []
    assert dist.group.WORLD is not None
    groups = [dist.group.WORLD]
    meshes = getattr(trainer.strategy, "meshes", None)
    for name in ("tensor_group", "data_group", "expert_group"):
        group = getattr(meshes, name, None)
        if group is not None and all(group is not known for known in groups):
            groups.append(group)
    return groups


@contextmanager
def _long_timeouts(groups: list[dist.ProcessGroup], timeout: timedelta) -> Iterator[None]:
    """Let collectives of these groups take at least `timeout`, then as long as before."""
    # No public way exists to read a group's time-out; its options are what it was made with.
    before = [(group, _timeout_of(group)) for group in groups]
    raised = [(group, old) for group, old in before if old is not None and old < timeout]
    for group, _ in raised:
        dist.distributed_c10d._set_pg_timeout(timeout, group)
    try:
        yield
    finally:
        for group, old in raised:
            dist.distributed_c10d._set_pg_timeout(old, group)


def _timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            return options._timeout
    return None


@contextmanager
def _untouched(pl_module: LightningModule, device: torch.device) -> Iterator[None]:
    """Put back gradients, buffers, module modes and random generators, also after an error."""
    gradients = [(parameter, parameter.grad) for parameter in pl_module.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in pl_module.buffers()]
    modes = [(module, module.training) for module in pl_module.modules()]
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    runtime = None if device.type == "cpu" else torch.get_device_module(device)
    device_state = None if runtime is None else runtime.get_rng_state(device)
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if runtime is not None:
            runtime.set_rng_state(device_state, device)
