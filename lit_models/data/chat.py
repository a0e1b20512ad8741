"""`ChatDataModule`: conversations for fine-tuning, learning what the assistant says, as Lightning data loaders.

It joins conversations, chat template and whole-sample packing, and counts by name what it leaves out: samples with
nothing to learn from, and samples longer than a sequence. Encoded once, in memory or in the token cache. Loaders,
order and position are the base class's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_npu_tp import DataError
from lit_models.data.cache import open_or_build
from lit_models.data.chat_template import ChatTemplate, Sample
from lit_models.data.conversations import Conversation, MessageKeys, read_conversations
from lit_models.data.documents import split_point
from lit_models.data.encoding import Progress, Side
from lit_models.data.module import (
    SequenceDataModule,
    as_list,
    at_least,
    digest,
    digest_of_files,
    digest_of_stream,
    require_paths,
)
from lit_models.data.rendering import kept
from lit_models.data.samples import SampleDataset
from lit_models.data.source_files import SourceFile, find_files
from lit_models.data.streams import StreamBuilder, TokenStream, open_stream
from lit_models.data.tokenizers import Tokenizer, fingerprint_of

_MOST_NAMES = 5


class ChatDataModule(SequenceDataModule):
    """Packed conversations; batches are dicts of int64 [batch_size, sequence_length], see `SampleDataset`.

    paths:           .jsonl, .json, .csv, .parquet and .arrow files, folders or glob patterns.
    sources:         instead of paths, {path, weight} each: how many times an epoch takes what is there, see `mixture`;
                     max_samples and val_fraction count for each source.
    val_paths:       the same, for validation; they are left out of `paths`, and `val_fraction` is unused.
    messages_key, role_key, content_key: where a record holds its messages, a message its role and its text; None for
                     what is recognised, see `conversations`.
    role_names:      the files' names for system, user, assistant, tool; ShareGPT's are known.
    tokenizer:       path of a Hugging Face tokenizer with a chat template.
    chat_template:   another template: a file, the template itself, or the name of one of several.
    train_on:        "all" assistant turns or the "last" alone.
    pack:            several conversations a sequence; false gives each its own, padded.
    too_long:        "drop" or "truncate" (to its first tokens) a conversation longer than a sequence.
    max_samples:     at most so many training samples; a conversation is one, or several, see `chat_template`.

    The other settings are those of `TextDataModule`.
    Raises DataError, with the setting to change or the file and line to repair, on construction or in `setup`.
    """

    def __init__(
        self,
        *,
        paths: str | Path | Sequence[str | Path] | None = None,
        val_paths: str | Path | Sequence[str | Path] | None = None,
        messages_key: str | None = None,
        role_key: str | None = None,
        content_key: str | None = None,
        role_names: Mapping[str, str] | None = None,
        tokenizer: str | Path | Tokenizer | None = None,
        eos_token: str | None = None,
        chat_template: str | None = None,
        train_on: str = "all",
        sequence_length: int = 2048,
        batch_size: int = 1,
        pack: bool = True,
        too_long: str = "drop",
        val_fraction: float = 0.05,
        seed: int = 0,
        shuffle: bool = True,
        max_samples: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        cache_dir: str | Path | None = None,
        on_changed: str = "error",
        sources: Sequence[Any] | None = None,
    ):
        settings = {name: value for name, value in locals().items() if name not in ("self", "sources", "__class__")}
        for name, value, known in (
            ("train_on", train_on, ("all", "last")),
            ("too_long", too_long, ("drop", "truncate")),
        ):
            if value not in known:
                raise DataError(f"data.{name}={value!r} is unknown. Set it to {known[0]!r} or {known[1]!r}.")
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
        at_least(max_samples=(max_samples, 1))
        self.paths = as_list(paths)
        self.val_paths = as_list(val_paths)
        self.keys = MessageKeys(messages_key, role_key, content_key, None if role_names is None else dict(role_names))
        self.template = ChatTemplate(self.tokenizer, chat_template, train_on=train_on)
        self.train_on = train_on
        self.pack = pack
        self.too_long = too_long
        self.max_samples = max_samples
        self._left_out: dict[str, list[str]] = {}
        self._formats: Counter[str] = Counter()

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
        val_files = find_files(self.val_paths, setting="data.val_paths", skipped=self._others) if self.val_paths else []
        held_out = {file.path.resolve() for file in val_files}
        files = [file for file in find_files(self.paths, skipped=self._others) if file.path.resolve() not in held_out]
        if not files:
            raise DataError("data.val_paths names every file of data.paths. Leave at least one for training.")
        self._files = digest_of_files(files)
        if self.cache_dir is None:
            sides, told = self._encode(files, val_files, None)
        else:
            key = digest(self._key(files, val_files))
            folder, told = open_or_build(self.cache_dir, key, lambda path: self._encode(files, val_files, path)[1])
            sides = [
                open_stream(folder / name, vocab_size=self.vocab_size, learn=True) for name in ("train", "validation")
            ]
            self._notes.append(f"tokens in {folder}")
        self._skipped.update(told["skipped"])
        self._notes += told["notes"]
        self._content = told["content"]
        self._pack(*sides)

    def _key(self, files: list[SourceFile], val_files: list[SourceFile]) -> dict[str, Any]:
        """All that the encoded samples depend on; a file that was written to since is another file."""
        stats = [(file, file.path.stat()) for file in [*files, *val_files]]
        return {
            "chat": asdict(self.keys),
            "files": [(str(file.path.resolve()), file.name, stat.st_size, stat.st_mtime_ns) for file, stat in stats],
            "val_files": len(val_files),
            "tokenizer": fingerprint_of(self.tokenizer),
            "template": [self.template.template, self.train_on],
            "split": [self.seed, self.val_fraction],
            "limits": [self.max_samples, self.sequence_length, self.too_long],
        }

    def _encode(
        self, files: list[SourceFile], val_files: list[SourceFile], folder: Path | None
    ) -> tuple[list[TokenStream], dict[str, Any]]:
        """Both sides' streams, in `folder` or memory, and what is told of them."""
        train, validation = self._side("train", folder, self.max_samples), self._side("validation", folder)
        progress = Progress(sum(file.path.stat().st_size for file in [*files, *val_files]))
        self._left_out, self._formats = {}, Counter()
        try:
            with kept():
                if val_files:
                    self._fill(
                        read_conversations(val_files, self.keys, self._formats), validation, validation, 0.0, progress
                    )
                    self._fill(read_conversations(files, self.keys, self._formats), train, train, 0.0, progress)
                else:
                    self._fill(
                        read_conversations(files, self.keys, self._formats),
                        train,
                        validation,
                        self.val_fraction,
                        progress,
                    )
                    if self.val_fraction > 0:
                        _give_each_side_one(train, validation)
            streams = [side.builder.build() for side in (train, validation)]
        finally:
            train.builder.close()
            validation.builder.close()
        progress.end()
        notes = [f"{count:,} conversations read as {name}" for name, count in sorted(self._formats.items())]
        return streams, {"skipped": self._counted(), "notes": notes, "content": digest_of_stream(streams[0])}

    def _side(self, name: str, folder: Path | None, max_samples: int | None = None) -> Side:
        path = None if folder is None else folder / name
        return Side(
            StreamBuilder(vocab_size=self.vocab_size, eos_id=None, max_documents=max_samples, learn=True, path=path)
        )

    def _fill(
        self, conversations: Iterator[Conversation], train: Side, validation: Side, fraction: float, progress: Progress
    ) -> None:
        """Encode each conversation into its side until both sides are full."""
        for conversation in conversations:
            point = split_point(self.seed, conversation.name)
            side = validation if point < fraction else train
            if not side.builder.full:
                samples, left_out = self.template.encode(conversation)
                for what in left_out:
                    self._leave_out(f"conversations of which the chat template leaves out {what}", conversation)
                if not samples:
                    self._leave_out("samples with nothing to learn from", conversation)
                if len(samples) > 1:
                    self._leave_out(
                        "conversations learnt in several samples, each as far as its last turn", conversation
                    )
                for sample in samples:
                    if (fitting := self._fitting(sample, conversation)) is not None:
                        side.builder.add(conversation.name, fitting.ids, learn=fitting.learn)
                side.note(conversation.name, point)
                characters = sum(len(message["content"]) for message in conversation.messages)
                progress.add(characters, train.builder.num_tokens)
            if train.builder.full and (validation.builder.full or fraction == 0):
                return

    def _fitting(self, sample: Sample, conversation: Conversation) -> Sample | None:
        """The sample, or its beginning, if it fits and teaches something; otherwise it is noted why not."""
        size = self.sequence_length
        if len(sample.ids) <= size:
            return sample
        if self.too_long == "drop":
            self._leave_out(f"samples with more than data.sequence_length={size} tokens", conversation)
            return None
        if not sample.learn[:size].any():
            self._leave_out(f"samples with nothing to learn from in their first {size} tokens", conversation)
            return None
        self._leave_out(f"samples cut to data.sequence_length={size} tokens", conversation)
        return Sample(sample.ids[:size], sample.learn[:size])

    def _leave_out(self, what: str, conversation: Conversation) -> None:
        self._left_out.setdefault(what, []).append(conversation.name)

    def _counted(self) -> dict[str, int]:
        """What `summary` says: reason and the first names -> how many."""
        counted = {}
        for why, names in self._left_out.items():
            more = ", …" if len(names) > _MOST_NAMES else ""
            counted[f"{why}: {', '.join(names[:_MOST_NAMES])}{more}"] = len(names)
        return counted

    def _pack(self, train: TokenStream, validation: TokenStream) -> None:
        if not train.num_documents:
            counts = "; ".join(f"{count} {what}" for what, count in sorted(self._skipped.items())) or "no sample"
            raise DataError(
                f"{self.paths} holds no conversation to train on ({counts}). Set data.paths to other files, raise "
                "data.sequence_length, or set data.too_long=truncate."
            )
        settings: dict[str, Any] = {
            "sequence_length": self.sequence_length,
            "pad_id": self.tokenizer.pad_id,
            "pack": self.pack,
        }
        if self.val_paths or self.val_fraction > 0:
            if not validation.num_documents:
                raise DataError(
                    f"No conversation is left to validate on (data.val_fraction={self.val_fraction}, data.val_paths="
                    f"{self.val_paths}). Give data.val_paths with conversations, a larger fraction, or 0 for none."
                )
            self.val_set = SampleDataset(validation, **settings)
        self.train_set = SampleDataset(train, **settings)

    def summary(self) -> str:
        """Samples, tokens, sequences and what was left out, a line a set; builds the sets if need be."""
        self.setup()
        if self.sources:
            return "\n".join(self._mixed_lines())
        marks = "marked by the template" if self.template.marks else "found in the rendered text"
        lines = [
            f"data: chat, tokenizer {self.tokenizer.name} ({self.vocab_size} ids), {self.train_on} assistant turns "
            f"{marks}"
        ]
        for name, dataset in (("train", self.train_set), ("validation", self.val_set)):
            if dataset is None:
                lines.append(f"  {name}: none")
                continue
            assert isinstance(dataset, SampleDataset)
            stream = dataset.stream
            filled = stream.num_tokens / (dataset.num_sequences * self.sequence_length)
            lines.append(
                f"  {name}: {stream.num_documents:,} samples, {stream.num_tokens:,} tokens, {dataset.num_sequences:,} "
                f"sequences of {self.sequence_length} ({filled:.0%} filled), {dataset.num_predicted:,} predictions"
            )
        return "\n".join(lines + self._summary_end())


def _give_each_side_one(train: Side, validation: Side) -> None:
    """Few conversations may all fall on one side: move the nearest over; a lone one stays, and `_pack` says so."""
    full, empty = (train, validation) if train.builder.num_documents else (validation, train)
    _, first, name, count = full.lowest if full is train else full.highest
    if full.builder.num_documents <= count or empty.builder.num_documents:
        return
    for _ in range(count):
        _, ids, learn = full.builder.pop_learnt(first)
        empty.builder.add(name, ids, learn=learn)
