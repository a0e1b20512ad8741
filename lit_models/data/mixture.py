"""Several sources in one epoch, each by its weight: the sets end to end, and the order that takes from each its share.

With weight w a source of n sequences gives round(w*n) of them to an epoch. Which ones goes on from epoch to epoch, pass
by pass, each pass in an order of its own: weight 0.5 reaches every sequence in two epochs, weight 2 each twice in one.
All of it follows from seed and epoch alone, so an epoch is the same in every layout and resumes at any place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset
from typing_extensions import override

from lightning_npu_tp import DataError
from lit_models.data.order import Permutation


@dataclass(frozen=True)
class Source:
    """An entry of `data.sources`: a path as in `data.paths`, and how many times an epoch takes what is there."""

    path: str
    weight: float = 1.0

    @classmethod
    def of(cls, entry: Any, number: int) -> Source:
        """Raises DataError, naming the entry, for one of another form."""
        where = f"data.sources[{number}]"
        if isinstance(entry, (str, Path)):
            return cls(str(entry))
        if not isinstance(entry, Mapping) or "path" not in entry or set(entry) - {"path", "weight"}:
            raise DataError(f"{where}={entry!r} is no source. Write {{path: FOLDER, weight: 1.0}}, or the path alone.")
        path, weight = entry["path"], entry.get("weight", 1.0)
        if not isinstance(path, (str, Path)):
            raise DataError(f"{where}.path={path!r} is no path. A source has one; several are several sources.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise DataError(
                f"{where}.weight={weight!r} is no number above 0. Set it to how many times an epoch takes the source, "
                "such as 2 or 0.5, or leave the source out."
            )
        return cls(str(path), float(weight))


class Mixture:
    """Which sequence of sets end to end stands at each place of an epoch.

    sizes:   sequences of each set. weights: as `Source` says.
    shuffle: false lays the sources end to end in their own order, each pass like the last.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, seed: int, shuffle: bool) -> None:
        self._sizes, self._seed, self._shuffle = list(sizes), seed, shuffle
        # At least one: a source that gives nothing is not what a weight above 0 says.
        self._counts = [max(1, round(size * weight)) for size, weight in zip(sizes, weights, strict=True)]
        self._ends = np.cumsum(self._counts)
        self._begins = np.cumsum([0, *self._sizes[:-1]])
        self._passes: dict[tuple[int, int], Permutation] = {}

    @property
    def size(self) -> int:
        """Places of an epoch."""
        return int(self._ends[-1])

    @property
    def counts(self) -> list[int]:
        """How many of them each source has."""
        return list(self._counts)

    def indices(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Indices int64 [n] into the sets end to end, of places int64 [n] in range(size)."""
        slots = Permutation(self.size, seed=self._seed, epoch=epoch)(places) if self._shuffle else places
        found = np.empty(len(slots), dtype=np.int64)
        owners = np.searchsorted(self._ends, slots, side="right")
        for source in np.unique(owners).tolist():
            mine = owners == source
            nth = slots[mine] - (self._ends[source] - self._counts[source])
            if self._shuffle:
                nth = nth + epoch * self._counts[source]
            found[mine] = self._begins[source] + self._of_source(source, nth)
        return found

    def _of_source(self, source: int, nth: np.ndarray) -> np.ndarray:
        passes, within = np.divmod(nth, self._sizes[source])
        if not self._shuffle:
            return within
        result = np.empty(len(nth), dtype=np.int64)
        for number in np.unique(passes).tolist():
            mine = passes == number
            result[mine] = self._order(source, number)(within[mine])
        return result

    def _order(self, source: int, number: int) -> Permutation:
        if (source, number) not in self._passes:
            if len(self._passes) > 2 * len(self._sizes) + 8:
                self._passes.clear()
            # Sources that are alike are not to go in step.
            seed = int(np.random.SeedSequence([self._seed & (2**64 - 1), source]).generate_state(1)[0])
            self._passes[source, number] = Permutation(self._sizes[source], seed=seed, epoch=number)
        return self._passes[source, number]


class MixedSet(ConcatDataset[dict[str, torch.Tensor]]):
    """Sets of sequences end to end, as one; items have the same keys whichever set they are of."""

    def __init__(self, sets: Sequence[Any]) -> None:
        super().__init__(sets)
        self.sets = list(sets)
        self.num_sequences = sum(one.num_sequences for one in sets)
        self.num_predicted = sum(one.num_predicted for one in sets)
        self._has_mask = any("token_mask" in one[0] for one in sets)

    def round_up(self, multiple: int) -> MixedSet:
        """This set with blank sequences (labels all -100) up to a multiple of `multiple`."""
        last = copy.copy(self.sets[-1])
        last.num_blank = -self.num_sequences % multiple
        return MixedSet([*self.sets[:-1], last])

    @override
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = super().__getitem__(index)
        if self._has_mask and "token_mask" not in item:
            item["token_mask"] = torch.ones(len(item["input_ids"]), dtype=torch.bool)
        return item
