"""`TextDataModule`: real text, from the standard library or a user's files, as Lightning data loaders.

It joins the three parts (documents, tokenizer, packing) and settles what only a data module can: which
document validates, what order an epoch has, and which sequences a rank sees. Every rank builds the
sets itself from the same files and settings, so nothing is communicated. It does not know the model;
whoever builds both calls `check_vocabulary`.

Samplers are set here rather than left to Lightning: its automatic one takes its seed from the
environment and is absent under one device, so the same job would see other batches on one device than on
two. Ours asks the strategy for the data-parallel rank (`distributed_sampler_kwargs`), so ranks that share a
model replica get the same batches, and N data ranks together see the batches of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_npu_tp.errors import DataError
from lit_models.data.documents import Document, find_files, read_files, read_stdlib, split_point, stdlib_files
from lit_models.data.packing import PackedDataset, StreamBuilder
from lit_models.data.tokenizers import Tokenizer, load_tokenizer

Batch = dict[str, torch.Tensor]


class TextDataModule(LightningDataModule):
    """Packed sequences of text; batches are dicts of int64 [batch_size, sequence_length], see `PackedDataset`.

    source:            "stdlib" (the running Python's own sources) or "text" (`paths`).
    paths:             .txt, .jsonl, .parquet files, folders or glob patterns; for "text" only.
    val_paths:         the same, for validation; they are left out of `paths`, and `val_fraction` is unused.
    text_key:          key (.jsonl) or column (.parquet) that holds the text.
    tokenizer:         None for bytes, the path of a Hugging Face tokenizer, or any `Tokenizer`.
    eos_token:         end token of a Hugging Face tokenizer whose files name none.
    sequence_length:   tokens a sequence, at least 2.
    batch_size:        sequences a data rank takes per step.
    val_fraction:      share of the documents that validates, in [0, 1); 0 means no validation. A document
                       is wholly on one side. At least one is on each; a lone document is cut in two.
    seed:              of the split and of the shuffling.
    isolate_documents: no attention and no prediction across documents; adds position_ids.
    shuffle:           a new order of training sequences each epoch, from seed and epoch alone.
    max_documents:     at most so many training documents.
    max_tokens:        at most so many training tokens, eos included; the last document is cut.
    max_val_tokens:    the same for validation.
    num_workers:       loader processes; 0 cuts sequences in the main one, which takes microseconds.
    pin_memory:        page-locked batches, for copies to a device that overlap with compute.
    include_tests:     for "stdlib": the library's own tests too.

    All training batches are full: the rest of an epoch's order that fills none is left for another
    epoch's order to reach. All validation, test and predict batches are full too, by blank sequences
    (labels all -100) at the end, so each sequence counts once on any number of data ranks and shapes
    never change. A rank's last batch can be all blank when there is more than one data rank.

    Raises DataError, with the setting to change, on construction or in `setup`.
    """

    def __init__(
        self,
        *,
        source: Literal["stdlib", "text"] = "stdlib",
        paths: str | Path | Sequence[str | Path] | None = None,
        val_paths: str | Path | Sequence[str | Path] | None = None,
        text_key: str = "text",
        tokenizer: str | Path | Tokenizer | None = None,
        eos_token: str | None = None,
        sequence_length: int = 256,
        batch_size: int = 8,
        val_fraction: float = 0.05,
        seed: int = 0,
        isolate_documents: bool = False,
        shuffle: bool = True,
        max_documents: int | None = None,
        max_tokens: int | None = None,
        max_val_tokens: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        include_tests: bool = False,
    ):
        super().__init__()
        if source not in ("stdlib", "text"):
            raise DataError(f"data.source={source!r} is unknown. Set it to 'stdlib' or 'text'.")
        if source == "stdlib" and (paths or val_paths):
            raise DataError("data.paths and data.val_paths need data.source=text, but it is 'stdlib'. Use data=text.")
        if not 0 <= val_fraction < 1:
            raise DataError(
                f"data.val_fraction={val_fraction} is not in [0, 1). Set it to a share such as 0.05, or 0 for none."
            )
        for name, value, least in (
            ("sequence_length", sequence_length, 2),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("max_documents", max_documents, 1),
            ("max_tokens", max_tokens, sequence_length),
            ("max_val_tokens", max_val_tokens, 2),
        ):
            if value is not None and value < least:
                raise DataError(f"data.{name}={value} is too small. Set it to {least} or more.")
        self.source = source
        self.paths = _as_list(paths)
        self.val_paths = _as_list(val_paths)
        self.text_key = text_key
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.isolate_documents = isolate_documents
        self.shuffle = shuffle
        self.max_documents = max_documents
        self.max_tokens = max_tokens
        self.max_val_tokens = max_val_tokens
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.include_tests = include_tests
        self.train_set: PackedDataset | None = None
        self.val_set: PackedDataset | None = None
        # Loaded now: a model needs the vocabulary size before any stage begins, and a bad path should fail early.
        if tokenizer is None or isinstance(tokenizer, (str, Path)):
            tokenizer = load_tokenizer(tokenizer, eos_token=eos_token)
        self.tokenizer: Tokenizer = tokenizer
        self._skipped: Counter[str] = Counter()
        self._notes: list[str] = []

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer: the least vocabulary that a model needs."""
        return self.tokenizer.vocab_size

    def setup(self, stage: str | None = None) -> None:
        """Read, encode and pack both sets, once; every stage uses the same two."""
        if self.train_set is not None:
            return
        self._skipped.clear()
        self._notes.clear()
        train, validation = self._builder(self.max_tokens, self.max_documents), self._builder(self.max_val_tokens)
        if self.val_paths:
            val_files = find_files(self.val_paths, setting="data.val_paths")
            held_out = {file.path.resolve() for file in val_files}
            train_files = [file for file in find_files(self.paths) if file.path.resolve() not in held_out]
            if not train_files:
                raise DataError("data.val_paths names every file of data.paths. Leave at least one for training.")
            self._fill(read_files(val_files, text_key=self.text_key), validation, validation, fraction=0.0)
            self._fill(read_files(train_files, text_key=self.text_key), train, train, fraction=0.0)
        else:
            self._fill(self._documents(), train, validation, fraction=self.val_fraction)
            if self.val_fraction > 0:
                self._give_each_side_one(train, validation)
        self._pack(train, validation)

    def _builder(self, max_tokens: int | None, max_documents: int | None = None) -> StreamBuilder:
        return StreamBuilder(
            vocab_size=self.tokenizer.vocab_size,
            eos_id=self.tokenizer.eos_id,
            max_tokens=max_tokens,
            max_documents=max_documents,
        )

    def _documents(self) -> Iterator[Document]:
        if self.source == "text":
            return read_files(find_files(self.paths), text_key=self.text_key)
        files = stdlib_files(include_tests=self.include_tests)
        # By split point and not by name: a limit on tokens then takes a fair sample of the library and not "a*.py",
        # and the validation files come first, so that reading stops when training has enough.
        return read_stdlib(sorted(files, key=lambda file: split_point(self.seed, file.name)), self._skipped)

    def _fill(
        self, documents: Iterator[Document], train: StreamBuilder, validation: StreamBuilder, *, fraction: float
    ) -> None:
        """Encode each document into its side until both sides are full; a full side's documents are not encoded."""
        for document in documents:
            side = validation if split_point(self.seed, document.name) < fraction else train
            if not side.full and not side.add(document.name, self.tokenizer.encode(document.text)):
                self._skipped["empty documents"] += 1
            if train.full and (validation.full or fraction == 0):
                return

    def _give_each_side_one(self, train: StreamBuilder, validation: StreamBuilder) -> None:
        """Few documents may all fall on one side: move the nearest one over, or cut the only one in two."""
        total = train.num_documents + validation.num_documents
        if total == 1:
            name, ids = (train if train.num_documents else validation).pop(0)
            cut = round(len(ids) * (1 - self.val_fraction))
            train.add(name, ids[:cut])
            validation.add(name, ids[cut:])
            self._notes.append(f"the only document is cut in two: its last {self.val_fraction:.0%} validate")
        elif total > 1 and not (train.num_documents and validation.num_documents):
            empty, other = (validation, train) if train.num_documents else (train, validation)
            points = [split_point(self.seed, name) for name in other.names]
            nearest = points.index(min(points) if empty is validation else max(points))
            empty.add(*other.pop(nearest))

    def _pack(self, train: StreamBuilder, validation: StreamBuilder) -> None:
        settings: dict[str, Any] = {
            "sequence_length": self.sequence_length,
            "pad_id": self.tokenizer.pad_id,
            "isolate_documents": self.isolate_documents,
        }
        if not train.num_documents:
            where = self.paths if self.source == "text" else "the standard library"
            counts = ", ".join(f"{count} {what}" for what, count in sorted(self._skipped.items())) or "no document"
            raise DataError(f"{where} holds no text to train on ({counts} found). Set data.paths to files with text.")
        train_set = PackedDataset(train.build(), last="drop", **settings)
        if self.val_paths or self.val_fraction > 0:
            if not validation.num_documents:
                raise DataError(
                    f"No text is left to validate on (data.val_fraction={self.val_fraction}, data.val_paths="
                    f"{self.val_paths}). Give data.val_paths with text, a larger fraction, or 0 for no validation."
                )
            self.val_set = PackedDataset(validation.build(), last="pad", **settings)
        self.train_set = train_set

    def _data_rank(self) -> tuple[int, int]:
        """(number of data ranks, this process's data rank), as the strategy says; (1, 0) without a trainer."""
        kwargs = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (1, 0) if kwargs is None else (kwargs["num_replicas"], kwargs["rank"])

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled full batches of this data rank; the order follows `set_epoch`, which Lightning calls."""
        self.setup()
        assert self.train_set is not None
        replicas, rank = self._data_rank()
        if len(self.train_set) < replicas * self.batch_size:
            raise DataError(
                f"{len(self.train_set)} training sequences do not fill one batch of data.batch_size={self.batch_size} "
                f"on each of {replicas} data rank(s). Give more text, or lower data.batch_size or data.sequence_length "
                f"({self.sequence_length})."
            )
        sampler: DistributedSampler[Batch] = DistributedSampler(
            self.train_set, num_replicas=replicas, rank=rank, shuffle=self.shuffle, seed=self.seed, drop_last=True
        )
        return self._loader(self.train_set, sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The validation set in order, in full batches; an empty list, which Lightning skips, if there is none."""
        self.setup()
        if self.val_set is None:
            return []
        replicas, rank = self._data_rank()
        dataset = self.val_set.round_up(replicas * self.batch_size)
        sampler: DistributedSampler[Batch] = DistributedSampler(
            dataset, num_replicas=replicas, rank=rank, shuffle=False
        )
        return self._loader(dataset, sampler, drop_last=False)

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The validation set: there is no third split."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The validation set, for scoring text; blank sequences at its end have labels of -100 only."""
        return self.val_dataloader()

    def _loader(
        self, dataset: PackedDataset, sampler: DistributedSampler[Batch], *, drop_last: bool
    ) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
        )

    def summary(self) -> str:
        """Documents, tokens, sequences and what was left out, a line a set; builds the sets if need be."""
        self.setup()
        lines = [f"data: {self.source}, tokenizer {self.tokenizer.name} ({self.vocab_size} ids)"]
        for name, dataset in (("train", self.train_set), ("validation", self.val_set)):
            if dataset is None:
                lines.append(f"  {name}: none")
                continue
            stream = dataset.stream
            line = (
                f"  {name}: {stream.num_documents:,} documents, {stream.num_tokens:,} tokens, "
                f"{dataset.num_sequences:,} sequences of {self.sequence_length}, {dataset.num_predicted:,} predictions"
            )
            lines.append(line + (f", {dataset.num_dropped} tokens dropped at the end" if dataset.num_dropped else ""))
        lines += [f"  skipped: {count} {what}" for what, count in sorted(self._skipped.items())]
        lines += [f"  note: {note}" for note in self._notes]
        return "\n".join(lines)


def _as_list(paths: str | Path | Sequence[str | Path] | None) -> list[str]:
    """Plain strings: a config library's own list would otherwise end up in checkpoints and error texts."""
    if paths is None:
        return []
    return [str(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
