"""What every data module does once it has its two sets of sequences: loaders, ranks, order and position.

Samplers are set here rather than left to Lightning: its automatic one takes its seed from the
environment and is absent under one device, so the same job would see other batches on one device than on
two. Ours asks the strategy for the data-parallel rank (`distributed_sampler_kwargs`), so ranks that share a
model replica get the same batches, and N data ranks together see the batches of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from lightning_npu_tp import DataError
from lit_models.data.cache import default_folder
from lit_models.data.mixture import MixedSet, Mixture, Source
from lit_models.data.order import EpochSampler
from lit_models.data.position import PositionedLoader, count_batches_as_done, load_late_states
from lit_models.data.source_files import SourceFile
from lit_models.data.streams import TokenStream
from lit_models.data.tokenizers import Tokenizer, fingerprint_of, load_tokenizer

Batch = dict[str, torch.Tensor]


class SequenceSet(Protocol):
    """What the loaders need of a set of sequences; `PackedDataset` and `SampleDataset` are ones."""

    num_sequences: int

    @property
    def num_predicted(self) -> int:
        """How many labels of the whole set are not -100."""
        ...

    def round_up(self, multiple: int) -> Any:
        """A copy of the set with blank sequences appended, up to a multiple of `multiple`."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Batch: ...


class SequenceDataModule(LightningDataModule):
    """Loaders over `train_set` and `val_set`, which a subclass makes in `setup` (None: not made, no validation).

    sources:    what to mix, instead of paths: see `mixture`.
    cache_dir:  folder for token caches; "auto" for one in the user's cache; None keeps tokens in memory.
    on_changed: what a resumed run does whose data is not that of its checkpoint: "error", or "restart" the epoch.

    The settings are those of `TextDataModule`. All training batches are full: the rest of an epoch's order that fills
    none is left for another epoch's order to reach. All validation, test and predict batches are full too, by
    blank sequences (labels all -100) at the end, so each sequence counts once on any number of data ranks
    and shapes never change. A rank's last batch can be all blank when there is more than one data rank.
    """

    def __init__(
        self,
        *,
        tokenizer: str | Path | Tokenizer | None,
        eos_token: str | None,
        sequence_length: int,
        batch_size: int,
        val_fraction: float,
        seed: int,
        shuffle: bool,
        num_workers: int,
        pin_memory: bool,
        cache_dir: str | Path | None,
        on_changed: str,
        sources: Sequence[Any] | None = None,
    ) -> None:
        super().__init__()
        self.sources = [Source.of(entry, number) for number, entry in enumerate(sources or [])]
        self._parts: list[Any] = []
        self._mixture: Mixture | None = None
        if not 0 <= val_fraction < 1:
            raise DataError(
                f"data.val_fraction={val_fraction} is not in [0, 1). Set it to a share such as 0.05, or 0 for none."
            )
        if on_changed not in ("error", "restart"):
            raise DataError(f"data.on_changed={on_changed!r} is unknown. Set it to 'error' or 'restart'.")
        at_least(sequence_length=(sequence_length, 2), batch_size=(batch_size, 1), num_workers=(num_workers, 0))
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.cache_dir = default_folder() if cache_dir == "auto" else None if cache_dir is None else Path(cache_dir)
        self.on_changed = on_changed
        self.train_set: SequenceSet | None = None
        self.val_set: SequenceSet | None = None
        # Loaded now: a model needs the vocabulary size before any stage begins, and a bad path should fail early.
        if tokenizer is None or isinstance(tokenizer, (str, Path)):
            tokenizer = load_tokenizer(tokenizer, eos_token=eos_token)
        self.tokenizer: Tokenizer = tokenizer
        self._skipped: Counter[str] = Counter()
        self._others: Counter[str] = Counter()  # files that are not read
        self._notes: list[str] = []
        self._files = ""  # digest of the files' names and sizes
        self._content = ""  # digest of the training tokens

    def _mix(self, parts: Sequence[SequenceDataModule], val_paths: Sequence[str]) -> None:
        """Take the sets of these modules, one a source, as this one's."""
        for number, part in enumerate(parts):
            try:
                part.setup("fit")
            except DataError as error:
                raise DataError(f"data.sources[{number}]: {error}") from error
        sets = [part.train_set for part in parts]
        self._parts = list(parts)
        self.train_set = MixedSet(sets)
        weights = [source.weight for source in self.sources]
        self._mixture = Mixture([len(one) for one in sets], weights, seed=self.seed, shuffle=self.shuffle)  # type: ignore[arg-type]
        validation = [part.val_set for part in parts if part.val_set is not None]
        if val_paths:
            # Each part has left these files out, and has them.
            validation = validation[:1]
        self.val_set = MixedSet(validation) if validation else None
        self._files = digest([part._files for part in parts])
        self._content = digest([part._content for part in parts])

    def _mixed_lines(self) -> list[str]:
        """What the summaries of the parts say, and what an epoch takes of each."""
        assert self._mixture is not None
        lines = [f"data: {len(self._parts)} sources, {self._mixture.size:,} sequences an epoch"]
        for source, part, count in zip(self.sources, self._parts, self._mixture.counts, strict=True):
            lines.append(f"{source.path}, weight {source.weight:g}: {count:,} sequences an epoch")
            lines += part.summary().splitlines()[1:]
        return lines

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer: the least vocabulary that a model needs."""
        return self.tokenizer.vocab_size

    def identity(self) -> dict[str, Any]:
        """What a position in the training data is counted over; the same on every machine for the same tokens."""
        self.setup("fit")
        assert self.train_set is not None
        return {
            "content": self._content,
            "files": self._files,
            "tokenizer": fingerprint_of(self.tokenizer),
            "data.sequence_length": self.sequence_length,
            "data.seed": self.seed,
            "data.shuffle": self.shuffle,
            "number of sequences": len(self.train_set),
        } | ({"data.sources' weights": [source.weight for source in self.sources]} if self.sources else {})

    def _data_rank(self) -> tuple[int, int]:
        """(number of data ranks, this process's data rank), as the strategy says; (1, 0) without a trainer."""
        kwargs = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (1, 0) if kwargs is None else (kwargs["num_replicas"], kwargs["rank"])

    @override
    def train_dataloader(self) -> PositionedLoader:
        """Shuffled full batches of this data rank; the order follows `set_epoch`, which Lightning calls."""
        self.setup("fit")
        assert self.train_set is not None
        replicas, rank = self._data_rank()
        size = len(self.train_set) if self._mixture is None else self._mixture.size
        if size < replicas * self.batch_size:
            raise DataError(
                f"{size} training sequences do not fill one batch of data.batch_size={self.batch_size} "
                f"on each of {replicas} data rank(s). Give more text, or lower data.batch_size or data.sequence_length "
                f"({self.sequence_length})."
            )
        sampler = EpochSampler(
            self.train_set,
            num_replicas=replicas,
            rank=rank,
            batch_size=self.batch_size,
            shuffle=self.shuffle,
            seed=self.seed,
            size=size,
            indices_of=None if self._mixture is None else self._mixture.indices,
        )
        sampler.before_epoch = self._before_epoch
        return PositionedLoader(
            self.train_set,
            sampler=sampler,
            drop_last=True,
            identity=self.identity(),
            on_changed=self.on_changed,
            on_resume=self._on_resume,
            **self._loader_settings(),
        )

    def _before_epoch(self) -> None:
        # A user's own loop has no fit loop, nor do tests that only ask for the loader.
        if isinstance(self.trainer, Trainer):
            load_late_states(self.trainer)

    def _on_resume(self, batches: int) -> None:
        if isinstance(self.trainer, Trainer):
            count_batches_as_done(self.trainer, batches)

    @override
    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The validation set in order, in full batches; an empty list, which Lightning skips, if there is none."""
        self.setup("validate")
        if self.val_set is None:
            return []
        replicas, rank = self._data_rank()
        dataset: Dataset[Batch] = self.val_set.round_up(replicas * self.batch_size)
        sampler: DistributedSampler[Batch] = DistributedSampler(
            dataset, num_replicas=replicas, rank=rank, shuffle=False
        )
        return DataLoader(dataset, sampler=sampler, **self._loader_settings())

    @override
    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The validation set: there is no third split."""
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The validation set, for scoring text; blank sequences at its end have labels of -100 only."""
        return self.val_dataloader()

    def _loader_settings(self) -> dict[str, Any]:
        if self.num_workers > 0:
            # Loader processes cut sequences and never encode; the tokenizers library would warn at every fork.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "pin_memory": self.pin_memory,
            "persistent_workers": self.num_workers > 0,
        }

    def _summary_end(self) -> list[str]:
        lines = [f"  skipped: {count} {what}" for what, count in sorted((self._skipped + self._others).items())]
        return lines + [f"  note: {note}" for note in self._notes]


def at_least(**settings: tuple[int | None, int]) -> None:
    """Raise DataError for a setting (value, least) whose value is too small; None is left alone."""
    for name, (value, least) in settings.items():
        if value is not None and value < least:
            raise DataError(f"data.{name}={value} is too small. Set it to {least} or more.")


def require_paths(paths: Any, sources: Any) -> None:
    """Raise DataError unless one of data.paths and data.sources is given."""
    if paths and sources:
        raise DataError("data.paths and data.sources are both set. Put the paths among the sources.")
    if paths is None and not sources:
        raise DataError("data.paths is empty. Give files, folders or glob patterns, or data.sources with weights.")


def as_list(paths: str | Path | Sequence[str | Path] | None) -> list[str]:
    """Plain strings: a config library's own list would otherwise end up in checkpoints and error texts."""
    if paths is None:
        return []
    return [str(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]


def digest(value: Any) -> str:
    """Short digest of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_files(files: Iterable[SourceFile]) -> str:
    """Of names below the given folders and sizes: the same for a copy of the corpus on another machine."""
    return digest([(file.name, file.path.stat().st_size) for file in files])


def digest_of_stream(stream: TokenStream) -> str:
    """Digest of a stream's tokens, document borders and marks; read in parts."""
    crc = 0
    for values in (stream.tokens, stream.starts, stream.learn):
        for begin in range(0, 0 if values is None else len(values), 2**22):
            assert values is not None
            crc = zlib.crc32(values[begin : begin + 2**22].data, crc)
    return f"{crc:08x}"
