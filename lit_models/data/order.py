"""The order of an epoch: a permutation set by seed and epoch alone, and the part of it that a data rank takes.

Step k of R data ranks with B sequences each takes the places k*R*B to (k+1)*R*B of the order, whatever R and B are:
an order does not know the layout. Any place is found without walking to it, so an epoch resumes in the middle.
Up to `TABLE_LIMIT` sequences the order is a table (torch.randperm as 4-byte integers, 64 MiB at most); beyond, where
a table of 1e9 sequences would cost each rank 4 GB, it is computed place by place and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from functools import partial

import numpy as np
import torch
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

TABLE_LIMIT = 2**24
_CHUNK = 8192  # places computed at once
_ROUNDS = 6


class Permutation:
    """A permutation of range(size), set by seed and epoch; called with places int64 [n] it gives indices int64 [n].

    Beyond `table_limit` it is a Feistel network of six rounds over the next power of four: a bijection for any round
    function; what falls outside of range(size) is sent through again until it falls inside (at most four times as
    much work, on average). Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002.
    """

    def __init__(self, size: int, *, seed: int, epoch: int, table_limit: int = TABLE_LIMIT) -> None:
        self.size = size
        self._table: np.ndarray | None = None
        if size <= table_limit:
            generator = torch.Generator().manual_seed(seed + epoch)
            self._table = torch.randperm(size, generator=generator).numpy().astype(np.int32)
            return
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        keys = np.random.SeedSequence([seed & (2**64 - 1), epoch]).generate_state(_ROUNDS, dtype=np.uint64)
        self._keys = [np.uint64(key) for key in keys]

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Index of the sequence at each place; places lie in range(size)."""
        if self._table is not None:
            return self._table[places].astype(np.int64)
        values = self._mix(places.astype(np.uint64))
        outside = np.flatnonzero(values >= self.size)
        while len(outside):
            values[outside] = self._mix(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)

    def _mix(self, values: np.ndarray) -> np.ndarray:
        half = np.uint64(self._half)
        mask = np.uint64((1 << self._half) - 1)
        left, right = values >> half, values & mask
        for key in self._keys:
            # The finaliser of splitmix64; its products wrap around on purpose.
            mixed = (right + key) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        return (left << half) | right


class EpochSampler(DistributedSampler):
    """This data rank's share of an epoch's order, beginning at any place of it.

    A DistributedSampler in name so that Lightning puts no sampler of its own in its place. The order's rest that does
    not fill one batch on every rank is left out.

    indices_of:   (epoch, places) -> indices, for another order of `size` places than one of each sequence.
    start:        place in the order, over all data ranks, at which iterations begin that are asked for from now on.
    before_epoch: called by `set_epoch`, the last thing that Lightning does before it runs an epoch's batches.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        num_replicas: int,
        rank: int,
        batch_size: int,
        shuffle: bool,
        seed: int,
        indices_of: Callable[[int, np.ndarray], np.ndarray] | None = None,
        size: int | None = None,
    ):
        super().__init__(
            dataset,  # type: ignore[arg-type]
            num_replicas=num_replicas,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=True,
        )
        self.samples_per_step = num_replicas * batch_size
        self._indices_of = indices_of
        self.size = len(dataset) if size is None else size
        self.num_steps = self.size // self.samples_per_step
        self.start = 0
        self.before_epoch: Callable[[], None] | None = None

    @override
    def __len__(self) -> int:
        """Samples of this rank in a whole epoch, wherever the next iteration begins."""
        return self.num_steps * self.samples_per_step // self.num_replicas

    @override
    def set_epoch(self, epoch: int) -> None:
        """Take this epoch's order from the next iteration on."""
        if self.before_epoch is not None:
            self.before_epoch()
        super().set_epoch(epoch)

    @override
    def __iter__(self) -> Iterator[int]:
        # Taken now and not at the first index: loaders ask for an iterator more than once before they use one.
        return self._indices(self.start, self.epoch)

    def _indices(self, start: int, epoch: int) -> Iterator[int]:
        order: Callable[[np.ndarray], np.ndarray] | None = None
        if self._indices_of is not None:
            order = partial(self._indices_of, epoch)
        elif self.shuffle:
            order = Permutation(self.size, seed=self.seed, epoch=epoch)
        steps = (self.size - start) // self.samples_per_step
        end = start + steps * self.samples_per_step
        for begin in range(start + self.rank, end, _CHUNK * self.num_replicas):
            places = np.arange(begin, min(end, begin + _CHUNK * self.num_replicas), self.num_replicas)
            yield from (places if order is None else order(places)).tolist()
