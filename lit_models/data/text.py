"""`TextDataModule`: real text, from the standard library or a user's files, as Lightning data loaders.

It joins documents, tokenizer and packing, and settles which document validates. Files are read as streams and
encoded once, into memory or into a cache that later runs and other ranks map; every rank otherwise builds the sets
itself from the same files and settings, so nothing is communicated. It does not know the model; whoever builds
both calls `check_vocabulary`. Loaders and order are the base class's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from typing_extensions import override

from lightning_npu_tp import DataError
from lit_models.data.cache import open_or_build
from lit_models.data.documents import Document, read_files, read_stdlib, split_point, stdlib_files
from lit_models.data.encoding import Progress, Side, batches, cut_parts
from lit_models.data.module import (
    SequenceDataModule,
    as_list,
    at_least,
    digest,
    digest_of_files,
    digest_of_stream,
    require_paths,
)
from lit_models.data.packing import PackedDataset
from lit_models.data.source_files import SourceFile, find_files
from lit_models.data.streams import StreamBuilder, TokenStream, open_stream
from lit_models.data.tokenizers import Tokenizer, encode_all, fingerprint_of


class TextDataModule(SequenceDataModule):
    """Packed sequences of text; batches are dicts of int64 [batch_size, sequence_length], see `PackedDataset`.

    source:            "stdlib" (the running Python's own sources) or "text" (`paths`).
    paths:             .txt, .jsonl, .json, .csv, .parquet and .arrow files, folders or glob patterns; for "text" only.
    sources:           instead of paths, {path, weight} each: how often an epoch takes what is there, see `mixture`;
                       limits and val_fraction count for each source.
    val_paths:         the same as paths, for validation; they are left out of `paths`, and `val_fraction` is unused.
    text_key:          key or column that holds the text.
    tokenizer:         None for bytes, the path of a Hugging Face tokenizer, or any `Tokenizer`.
    eos_token:         end token of a Hugging Face tokenizer whose files name none.
    add_bos:           begin each document with the tokenizer's begin token; otherwise a document has its own tokens and
                       eos, nothing else.
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
    cache_dir:         for "text": where tokens are kept on disk; "auto" is the user's cache folder, None is memory.
    on_changed:        "error" or "restart" of the epoch, where a resumed run's data is not its checkpoint's.

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
        add_bos: bool = False,
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
        cache_dir: str | Path | None = None,
        on_changed: str = "error",
        sources: Sequence[Any] | None = None,
    ):
        settings = {name: value for name, value in locals().items() if name not in ("self", "sources", "__class__")}
        if source not in ("stdlib", "text"):
            raise DataError(f"data.source={source!r} is unknown. Set it to 'stdlib' or 'text'.")
        if source == "stdlib" and (paths or val_paths or sources):
            raise DataError(
                "data.paths or data.sources and val_paths need data.source=text, but it is 'stdlib'. Use data=text."
            )
        if source == "text":
            require_paths(paths, sources)
        super().__init__(
            tokenizer=tokenizer,
            eos_token=eos_token,
            sequence_length=sequence_length,
            batch_size=batch_size,
            val_fraction=val_fraction,
            seed=seed,
            shuffle=shuffle,
            num_workers=num_workers,
            pin_memory=pin_memory,
            cache_dir=cache_dir,
            on_changed=on_changed,
            sources=sources,
        )
        self._settings = settings | {"tokenizer": self.tokenizer, "cache_dir": self.cache_dir}
        at_least(
            max_documents=(max_documents, 1),
            max_tokens=(max_tokens, sequence_length),
            max_val_tokens=(max_val_tokens, 2),
        )
        self.bos_id: int | None = getattr(self.tokenizer, "bos_id", None) if add_bos else None
        if add_bos and self.bos_id is None:
            raise DataError(
                f"data.add_bos=true, but the tokenizer {self.tokenizer.name!r} names no begin token (bos). Set "
                "data.add_bos=false, or bos_token in its tokenizer_config.json."
            )
        self.source = source
        self.paths = as_list(paths)
        self.val_paths = as_list(val_paths)
        self.text_key = text_key
        self.isolate_documents = isolate_documents
        self.max_documents = max_documents
        self.max_tokens = max_tokens
        self.max_val_tokens = max_val_tokens
        self.include_tests = include_tests

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read, encode and pack both sets, once; every stage uses the same two."""
        if self.train_set is not None:
            return
        if self.sources:
            self._mix(
                [type(self)(**self._settings | {"paths": source.path}) for source in self.sources], self.val_paths
            )
            return
        files, val_files = self._find()
        self._files = digest_of_files(files)
        if self.cache_dir is None or self.source == "stdlib":
            sides, told = self._encode(files, val_files, None)
        else:
            key = digest(self._key(files, val_files))
            size = sum(file.path.stat().st_size for file in [*files, *val_files])
            # A token is a byte of text or more; parquet may be packed more densely than that.
            most = size * (2 if self.vocab_size <= 2**16 else 4)
            folder, told = open_or_build(
                self.cache_dir, key, lambda path: self._encode(files, val_files, path)[1], most_bytes=most
            )
            sides = [
                open_stream(folder / name, vocab_size=self.vocab_size, learn=False) for name in ("train", "validation")
            ]
            self._notes.append(f"tokens in {folder}")
        self._skipped.update(told["skipped"])
        self._notes += told["notes"]
        self._content = told["content"]
        self._pack(*sides)

    def _find(self) -> tuple[list[SourceFile], list[SourceFile]]:
        """Files to read, and those that only validate."""
        if self.source == "stdlib":
            files = stdlib_files(include_tests=self.include_tests)
            # By split point and not by name: a limit on tokens then takes a fair sample of the library and not "a*.py",
            # and the validation files come first, so that reading stops when training has enough.
            return sorted(files, key=lambda file: split_point(self.seed, file.name)), []
        if not self.val_paths:
            return find_files(self.paths, skipped=self._others), []
        val_files = find_files(self.val_paths, setting="data.val_paths", skipped=self._others)
        held_out = {file.path.resolve() for file in val_files}
        files = [file for file in find_files(self.paths, skipped=self._others) if file.path.resolve() not in held_out]
        if not files:
            raise DataError("data.val_paths names every file of data.paths. Leave at least one for training.")
        return files, val_files

    def _key(self, files: list[SourceFile], val_files: list[SourceFile]) -> dict[str, Any]:
        """All that the encoded documents depend on; a file that was written to since is another file."""
        stats = [(file, file.path.stat()) for file in [*files, *val_files]]
        return {
            "files": [(str(file.path.resolve()), file.name, stat.st_size, stat.st_mtime_ns) for file, stat in stats],
            "val_files": len(val_files),
            "tokenizer": fingerprint_of(self.tokenizer),
            "text_key": self.text_key,
            "bos": self.bos_id,
            "split": [self.seed, self.val_fraction],
            "limits": [self.max_documents, self.max_tokens, self.max_val_tokens],
        }

    def _encode(
        self, files: list[SourceFile], val_files: list[SourceFile], folder: Path | None
    ) -> tuple[list[TokenStream], dict[str, Any]]:
        """Both sides' streams, in `folder` or memory, and what is told of them."""
        told: dict[str, Any] = {"skipped": {}, "notes": []}
        train = self._side("train", folder, self.max_tokens, self.max_documents)
        validation = self._side("validation", folder, self.max_val_tokens)
        progress = Progress(sum(file.path.stat().st_size for file in [*files, *val_files]))
        try:
            if val_files:
                self._fill(self._read(val_files), validation, validation, 0.0, progress)
                self._fill(self._read(files), train, train, 0.0, progress)
            else:
                self._fill(self._read(files), train, validation, self.val_fraction, progress)
                if self.val_fraction > 0:
                    told["notes"] += self._give_each_side_one(train, validation)
            streams = [side.builder.build() for side in (train, validation)]
        finally:
            train.builder.close()
            validation.builder.close()
        progress.end()
        told["skipped"] = dict(self._skipped)
        self._skipped.clear()
        told["content"] = digest_of_stream(streams[0])
        return streams, told

    def _side(self, name: str, folder: Path | None, max_tokens: int | None, max_documents: int | None = None) -> Side:
        return Side(
            StreamBuilder(
                vocab_size=self.vocab_size,
                eos_id=self.tokenizer.eos_id,
                bos_id=self.bos_id,
                max_tokens=max_tokens,
                max_documents=max_documents,
                path=None if folder is None else folder / name,
            )
        )

    def _read(self, files: list[SourceFile]) -> Iterator[Document]:
        if self.source == "stdlib":
            return read_stdlib(files, self._skipped)
        place_to_cut = getattr(self.tokenizer, "place_to_cut", None)
        documents = read_files(files, text_key=self.text_key, in_parts=place_to_cut is not None)
        return documents if place_to_cut is None else cut_parts(documents, place_to_cut)

    def _fill(
        self, documents: Iterator[Document], train: Side, validation: Side, fraction: float, progress: Progress
    ) -> None:
        """Encode each document into its side until both sides are full; a full side's documents are not encoded."""

        def side_of(document: Document) -> tuple[Side, float]:
            point = split_point(self.seed, document.name)
            return (validation if point < fraction else train), point

        def done() -> bool:
            return train.builder.full and (validation.builder.full or fraction == 0)

        for batch in batches(documents, lambda document: not side_of(document)[0].builder.full, done):
            for document, ids in zip(batch, encode_all(self.tokenizer, [one.text for one in batch]), strict=True):
                side, point = side_of(document)
                if side.builder.full:
                    continue
                if not side.builder.add(document.name, ids, ends=document.ends):
                    self._skipped["empty documents"] += 1
                side.note(document.name, point)
            progress.add(sum(len(document.text) for document in batch), train.builder.num_tokens)
            if done():
                return

    def _give_each_side_one(self, train: Side, validation: Side) -> list[str]:
        """Few documents may all fall on one side: move the nearest one over, or cut the only one in two."""
        full, empty = (train, validation) if train.builder.num_documents else (validation, train)
        total = full.builder.num_documents
        if total == 0 or empty.builder.num_documents:
            return []
        if total > 1:
            index, name = full.lowest[1:3] if full is train else full.highest[1:3]
            empty.builder.add(name, full.builder.pop(index)[1])
            return []
        length = full.builder.num_tokens - 1  # without eos
        cut = round(length * (1 - self.val_fraction))
        begin, end = (cut, length) if full is train else (0, cut)
        full.builder.give_part(begin, end, empty.builder, full.lowest[2])
        return [f"the only document is cut in two: its last {self.val_fraction:.0%} validate"]

    def _pack(self, train: TokenStream, validation: TokenStream) -> None:
        settings: dict[str, Any] = {
            "sequence_length": self.sequence_length,
            "pad_id": self.tokenizer.pad_id,
            "isolate_documents": self.isolate_documents,
        }
        if not train.num_documents:
            where = self.paths if self.source == "text" else "the standard library"
            counts = ", ".join(f"{count} {what}" for what, count in sorted(self._skipped.items())) or "no document"
            raise DataError(f"{where} holds no text to train on ({counts} found). Set data.paths to files with text.")
        train_set = PackedDataset(train, last="drop", **settings)
        if self.val_paths or self.val_fraction > 0:
            if not validation.num_documents:
                raise DataError(
                    f"No text is left to validate on (data.val_fraction={self.val_fraction}, data.val_paths="
                    f"{self.val_paths}). Give data.val_paths with text, a larger fraction, or 0 for no validation."
                )
            self.val_set = PackedDataset(validation, last="pad", **settings)
        self.train_set = train_set

    def summary(self) -> str:
        """Documents, tokens, sequences and what was left out, a line a set; builds the sets if need be."""
        self.setup()
        if self.sources:
            return "\n".join(self._mixed_lines())
        lines = [f"data: {self.source}, tokenizer {self.tokenizer.name} ({self.vocab_size} ids)"]
        for name, dataset in (("train", self.train_set), ("validation", self.val_set)):
            if dataset is None:
                lines.append(f"  {name}: none")
                continue
            assert isinstance(dataset, PackedDataset)
            stream = dataset.stream
            line = (
                f"  {name}: {stream.num_documents:,} documents, {stream.num_tokens:,} tokens, "
                f"{dataset.num_sequences:,} sequences of {self.sequence_length}, {dataset.num_predicted:,} predictions"
            )
            lines.append(line + (f", {dataset.num_dropped} tokens dropped at the end" if dataset.num_dropped else ""))
        return "\n".join(lines + self._summary_end())
