"""Loaders over data ranks: in evaluation every sample once, the same number of batches on every rank; seeds of workers.

Lightning divides a validation set with torch's DistributedSampler, which repeats samples until the ranks
divide them, so some count twice; for prediction it leaves some ranks with fewer batches, and the others
then wait for them forever. Here the last batches are shorter instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.overrides.distributed import (
    UnrepeatedDistributedSampler,
    UnrepeatedDistributedSamplerWrapper,
    _IndexBatchSamplerWrapper,
)
from torch.utils.data import DataLoader, Sampler
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from lightning_npu_tp.errors import ConfigError


def batch_sizes(num_samples: int, batch_size: int, ranks: int) -> list[int]:
    """Sizes of all ranks' batches, first batch first and by rank within it: as few rounds as possible, none empty.

    Raises ConfigError where some rank would have none.
    """
    rounds = -(-num_samples // (batch_size * ranks))
    batches = rounds * ranks
    if batches > num_samples:
        works = next((size for size in range(batch_size + 1, num_samples + 1) if _fits(num_samples, size, ranks)), None)
        repair = f"a batch size of {works}" if works else f"at least {ranks} samples, or fewer data ranks"
        raise ConfigError(
            f"{num_samples} samples in batches of {batch_size} cannot be divided over {ranks} data ranks so that each "
            f"is seen once and every rank has the same number of batches. Use {repair} for this data loader, or fill "
            f"it up with samples that count nothing."
        )
    full = (rounds - 1) * ranks
    rest = num_samples - full * batch_size
    if rest >= ranks:
        return [batch_size] * full + [rest // ranks + (rank < rest % ranks) for rank in range(ranks)]
    # Too few are left for a last batch of every rank: the round before gives one up for each that has none.
    full -= ranks
    return [batch_size] * full + [batch_size - (rank >= rest) for rank in range(ranks)] + [1] * ranks


def _fits(num_samples: int, batch_size: int, ranks: int) -> bool:
    return -(-num_samples // (batch_size * ranks)) * ranks <= num_samples


class EvenBatches(Sampler[list[int]]):
    """One rank's batches: every sample on one rank, as many batches on each; see `batch_sizes`."""

    def __init__(self, source: Any, num_samples: int, batch_size: int, rank: int, ranks: int) -> None:
        self._source = source
        self._sizes = batch_sizes(num_samples, batch_size, ranks)
        self._rank, self._ranks = rank, ranks
        self.batch_size, self.drop_last = batch_size, False

    @override
    def __iter__(self) -> Iterator[list[Any]]:
        if hasattr(self._source, "reset"):
            self._source.reset()
        first = 0
        for number, size in enumerate(self._sizes):
            if number % self._ranks == self._rank:
                yield [self._source[index] for index in range(first, first + size)]
            first += size

    def __len__(self) -> int:
        return len(self._sizes) // self._ranks


def without_repeated_samples(loader: Any) -> Any:
    """Let a data loader that would repeat samples, or run dry on some ranks only, do neither; changed in place.

    Left alone: loaders that are shuffled (training), that divide evenly, or whose sampler is of
    another kind.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(loader, DataLoader) or not isinstance(sampler, DistributedSampler) or loader.batch_size is None:
        wrapped = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
        if not isinstance(loader, DataLoader) or not isinstance(wrapped, DistributedSampler):
            return loader
        sampler = wrapped
    ranks = sampler.num_replicas
    num_samples = len(sampler.dataset)  # type: ignore[arg-type]
    if sampler.shuffle or sampler.drop_last or ranks == 1 or num_samples % ranks == 0:
        return loader
    indirect = isinstance(sampler, (DistributedSamplerWrapper, UnrepeatedDistributedSamplerWrapper))
    source = sampler.dataset if indirect else range(num_samples)
    batch_sampler = loader.batch_sampler
    batch_size = getattr(batch_sampler, "batch_size", None) or loader.batch_size
    assert batch_size is not None
    even: Any = EvenBatches(source, num_samples, batch_size, sampler.rank, ranks)
    if isinstance(batch_sampler, _IndexBatchSamplerWrapper) or isinstance(sampler, UnrepeatedDistributedSampler):
        # Lightning reads from it which samples a prediction is of.
        even = _IndexBatchSamplerWrapper(even)
    # The loader forbids it to those who might do it by mistake.
    object.__setattr__(loader, "batch_sampler", even)
    return loader


def seed_workers_by_data_rank(loader: Any, data_rank: int) -> None:
    """What Lightning does with `seed_everything(workers=True)`, where it would seed the workers by the global rank.

    Those of tensor ranks would draw apart. In place; a function of the user's own stays.
    """
    if int(os.environ.get("PL_SEED_WORKERS", 0)) and getattr(loader, "worker_init_fn", True) is None:
        loader.worker_init_fn = partial(pl_worker_init_function, rank=data_rank)
