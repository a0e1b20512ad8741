"""`TokensPerSecond`: training throughput of the whole run, validation and checkpoints excluded.

Measured on the host over a window of batches, without a device synchronisation: over a window the host can run
ahead of the device by a few batches at most. On cards the device is waited for once per window, and step time,
the share of its peak that the model's own arithmetic takes, and the most memory are logged; on the CPU nothing of
that happens. The arithmetic is `flops.py`'s.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_npu_tp.devices.device import torch_module
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.estimates.flops import peak_flops, training_flops_per_token
from lightning_npu_tp.estimates.what_fits import sizes_of

_PEAK_MEMORY = "allocated_bytes.all.peak"
_GIB = 2**30


class TokensPerSecond(Callback):
    """Logs train/tokens_per_second: tokens of all data ranks, per second of training.

    On npu and cuda, once per window: train/step_time_s (seconds of an optimizer step, the device waited for),
    train/mfu (share of the devices' dense bf16 peak; in 16-bit precisions, for a model and a device that are known),
    train/peak_memory_gib (most bytes in tensors so far, of this rank), and at the end the peak of every rank.

    window: batches to measure over, at least 1. The first batch, which compiles and warms caches, only
            starts the clock.
    key:    entry of a batch dict whose elements are the tokens.
    """

    def __init__(self, window: int = 20, key: str = "input_ids") -> None:
        if window < 1:
            raise ConfigError(f"TokensPerSecond(window={window}) measures nothing. Set window to 1 or more.")
        self.window = window
        self.key = key
        self._restart()

    def _restart(self) -> None:
        # (seconds of training, tokens), both since the start, at the end of each batch.
        self._marks: deque[tuple[float, int]] = deque(maxlen=self.window + 1)
        self._tokens = 0
        self._away = 0.0
        self._left_at: float | None = None
        # (seconds of training, tokens, optimizer steps) when the device was last waited for, and batches since.
        self._waited: tuple[float, int, int] | None = None
        self._batches = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new measurement."""
        self._restart()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock: a validation is not part of the training rate."""
        _wait_for_card(pl_module)
        self._left_at = time.perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the clock of the training rate run on after a validation."""
        _wait_for_card(pl_module)
        if self._left_at is not None:
            self._away += time.perf_counter() - self._left_at
            self._left_at = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch and log the rate."""
        self._tokens += batch[self.key].numel() * _data_ranks(trainer)
        self._marks.append((time.perf_counter() - self._away, self._tokens))
        (start, tokens_before), (stop, tokens_now) = self._marks[0], self._marks[-1]
        if stop > start:
            pl_module.log("train/tokens_per_second", (tokens_now - tokens_before) / (stop - start))
        if _is_card(pl_module):
            self._batches += 1
            if self._waited is None or self._batches >= self.window:
                self._measure_card(trainer, pl_module, batch[self.key].shape[-1])

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A window that holds a checkpoint would measure the disk: begin a new one."""
        self._marks.clear()
        self._waited = None

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the peak memory of every rank."""
        if not _is_card(pl_module):
            return
        own = torch.tensor([_peak_memory(pl_module.device)], dtype=torch.float32, device=pl_module.device)
        peaks = [own]
        if dist.is_available() and dist.is_initialized():
            peaks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            dist.all_gather(peaks, own)
        told = ", ".join(f"{rank}: {peak.item():.2f}" for rank, peak in enumerate(peaks))
        rank_zero_info(f"peak memory in tensors, GiB by rank: {told}")

    def _measure_card(self, trainer: Trainer, pl_module: LightningModule, length: int) -> None:
        """Wait for the device and log what was done since the last time, unless this is the first."""
        _wait_for_card(pl_module)
        now = (time.perf_counter() - self._away, self._tokens, trainer.global_step)
        before, self._waited, self._batches = self._waited, now, 0
        if before is None or now[0] <= before[0]:
            return
        seconds, tokens, steps = (after - earlier for after, earlier in zip(now, before, strict=True))
        if steps:
            pl_module.log("train/step_time_s", seconds / steps)
        pl_module.log("train/peak_memory_gib", _peak_memory(pl_module.device))
        if (most := _peak_rate(trainer, pl_module)) is not None:
            config = _config_of(pl_module)
            if config is not None:
                rate = tokens / seconds * training_flops_per_token(config, length)
                pl_module.log("train/mfu", rate / (most * trainer.world_size))


def _is_card(pl_module: LightningModule) -> bool:
    return pl_module is not None and pl_module.device.type != "cpu"


def _wait_for_card(pl_module: LightningModule) -> None:
    if _is_card(pl_module):
        torch_module(pl_module.device.type).synchronize(pl_module.device)


def _peak_memory(device: torch.device) -> float:
    """The most GiB that this process had in tensors on the device."""
    return torch_module(device.type).memory_stats(device).get(_PEAK_MEMORY, 0) / _GIB


def _peak_rate(trainer: Trainer, pl_module: LightningModule) -> float | None:
    """Operations per second of one device at most; None in precisions that the table is not of, and if unknown."""
    if "16" not in str(trainer.precision):
        return None
    module: Any = torch_module(pl_module.device.type)
    return peak_flops(module.get_device_name(pl_module.device))


def _config_of(pl_module: LightningModule) -> Any:
    """Config of the transformers model inside; None where there is none that the arithmetic knows."""
    configs = (module.config for module in pl_module.modules() if hasattr(module, "config"))
    return next((config for config in configs if sizes_of(config) is not None), None)


def _data_ranks(trainer: Trainer) -> int:
    """Number of ranks with batches of their own; tensor ranks share theirs."""
    kwargs = trainer.distributed_sampler_kwargs
    return 1 if kwargs is None else int(kwargs["num_replicas"])
