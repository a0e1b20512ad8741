"""Fill a sharded model from a Hugging Face folder: each rank reads its own slices, straight into its shards.

`weights_from` marks a model on the meta device; conversion shards it without any memory for the whole, gives every
shard its memory, and calls `fill` here. The name table says which tensors make up a parameter, the shard's bounds
which part of each this rank needs; reads go in file order. Every parameter must be filled exactly once, and every
tensor of the files be used or ignored for a stated reason, before the first byte is read.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_npu_tp.checkpoint.files import size_in_words
from lightning_npu_tp.checkpoint.peers import PeerFailure, Peers
from lightning_npu_tp.convert.weight_source import Target, mark, source_of
from lightning_npu_tp.errors import CheckpointError, ConfigError
from lightning_npu_tp.models.file_names import Bounds, KeyTable, Piece
from lightning_npu_tp.weights.safetensors_reader import MERGE, SliceReader, StoredTensor, WeightFiles, open_folder

_SHOWN = 10
_LINE_EVERY_S = 10.0
_QUANTISED = "It is quantised: take the unquantised weights, or convert it to bfloat16 first."


def weights_from(model: nn.Module, folder: str | Path) -> None:
    """Have `model`, built on the meta device, filled from a Hugging Face folder when a strategy converts it.

    Raises ConfigError for a model that has weights already.
    """
    if any(not parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(
            f"weights_from({folder}) needs a model without weights, but {type(model).__name__} has some already. Build "
            f"it under `with torch.device('meta')`, or leave weights_from out to keep them."
        )
    mark(model, _Folder(Path(folder)))


@dataclass(frozen=True)
class _Folder:
    """The source (`convert/weight_source.py`) that `weights_from` marks a model with."""

    folder: Path
    only_check: bool = False

    def fill(self, targets: Sequence[Target], table: KeyTable, *, family: str) -> LoadReport:
        return fill(self.folder, targets, table, family=family, peers=Peers(), only_check=self.only_check)


def leave_to_checkpoint(root: nn.Module) -> None:
    """Have the models in `root` that `weights_from` marked not filled: a checkpoint with every weight comes next."""
    for module in root.modules():
        if isinstance(source := source_of(module), _Folder):
            mark(module, replace(source, only_check=True))


@dataclass
class LoadReport:
    """What was read: by this rank (bytes, seconds), and of the files (tensors used, and ignored with the reason).

    left: nothing was read, because a checkpoint has the weights; problem: what is wrong with the files, then.
    """

    folder: Path
    tensors: int = 0
    bytes: int = 0
    seconds: float = 0.0
    ignored: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    left: bool = False
    problem: str = ""

    def line(self) -> str:
        """The report in one line, for the start of a run."""
        if self.left:
            return f"of the checkpoint; those of {self.folder} are not read" + (
                " and do not fit" if self.problem else ""
            )
        rate = size_in_words(round(self.bytes / max(self.seconds, 1e-9)))
        text = f"{self.tensors} tensors of {self.folder}; on this rank {size_in_words(self.bytes)}, {rate}/s"
        if self.ignored:
            reasons = sorted(set(self.ignored.values()))
            text += f"; {len(self.ignored)} not used: {', '.join(reasons)}"
        if self.absent:
            text += f"; not in the files, left at zero: {_shortened(self.absent)}"
        return text


@dataclass(frozen=True)
class _Read:
    stored: StoredTensor
    inside: Bounds
    out: Tensor


def fill(
    folder: Path, targets: Sequence[Target], table: KeyTable, *, family: str, peers: Peers, only_check: bool = False
) -> LoadReport:
    """Read every target's slices from the folder; every rank calls it.

    only_check: compare the files' headers only, and warn of what does not fit.
    Raises CheckpointError on all ranks, naming file, tensors and repair, if it cannot be done on any.
    """

    def work() -> LoadReport:
        started = time.monotonic()
        report = LoadReport(folder, left=only_check)
        if only_check:
            try:
                _planned(open_folder(folder), targets, table, report, family)
            except CheckpointError as error:
                report.problem = str(error)
            return report
        files = open_folder(folder)
        reads = _planned(files, targets, table, report, family)
        reader = SliceReader()
        try:
            with _progress(files, sum(_bytes(read) for read in reads), peers.is_main) as advance:
                for read in reads:
                    before = reader.bytes
                    reader.read(read.stored, read.inside, read.out)
                    advance(reader.bytes - before, read.stored.file)
        finally:
            reader.close()
        report.bytes, report.seconds = reader.bytes, time.monotonic() - started
        return report

    try:
        reports = peers.each(work)
    except PeerFailure as error:
        raise CheckpointError(f"The weights of {folder} could not be read. {error.words()}") from error
    if problem := reports[peers.rank].problem:
        rank_zero_warn(f"The run goes on with the weights of its checkpoint, although: {problem}")
    return reports[peers.rank]


def _bytes(read: _Read) -> int:
    return read.out.numel() * read.stored.dtype.itemsize


def _planned(
    files: WeightFiles, targets: Sequence[Target], table: KeyTable, report: LoadReport, family: str
) -> list[_Read]:
    """What to read, in file order. Raises CheckpointError that lists what is missing, left over or misshapen."""
    reads: list[_Read] = []
    missing: list[str] = []
    misshapen: list[str] = []
    used: dict[str, str] = {}
    shared: dict[str, str] = {}
    for target in targets:
        name, pieces = _pieces(target, table, files.tensors)
        lacking = [piece.key for piece in pieces if piece.key not in files.tensors]
        if lacking:
            if target.optional and len(lacking) == len(pieces):
                report.absent.append(name)
            else:
                missing += lacking
            continue
        covered = 0
        for piece in pieces:
            stored = files.tensors[piece.key]
            used[piece.key] = name
            if target.tensor.is_floating_point() and not stored.dtype.is_floating_point:
                raise CheckpointError(
                    f"{piece.key} in {stored.file} holds whole numbers ({str(stored.dtype).removeprefix('torch.')}) "
                    f"where the {family} model has real ones. {_QUANTISED}"
                )
            if stored.shape != piece.shape:
                misshapen.append(f"{piece.key} has shape {list(stored.shape)}, the model wants {list(piece.shape)}")
                continue
            if (overlap := piece.overlap(target.bounds)) is None:
                continue
            inside, place = overlap
            out = target.tensor[tuple(slice(*pair) for pair in place)]
            covered += out.numel()
            reads.append(_Read(stored, inside, out[0] if piece.stacked else out))
        if not misshapen:
            assert covered == target.tensor.numel(), f"{name}: {covered} of {target.tensor.numel()} elements"
        for other in target.names:
            for piece in table.pieces(other, target.shape) if other != name else []:
                shared[piece.key] = f"shared with {name}"
    left_over = []
    for key in files.tensors.keys() - used.keys():
        why = shared.get(key) or table.why_ignored(key)
        if why is None:
            left_over.append(key)
        else:
            report.ignored[key] = why
    if missing or misshapen or left_over:
        raise CheckpointError(_what_is_wrong(files, family, missing, misshapen, sorted(left_over)))
    report.tensors = len(used)
    return sorted(reads, key=lambda read: (read.stored.file, read.stored.start, read.inside))


def _pieces(target: Target, table: KeyTable, stored: Mapping[str, Any]) -> tuple[str, list[Piece]]:
    """The name under which the files hold a target, and its pieces; its own name where they hold none."""
    for name in target.names:
        pieces = table.find(name, target.shape, stored)
        if any(piece.key in stored for piece in pieces):
            return name, pieces
    return target.names[0], table.find(target.names[0], target.shape, stored)


def _what_is_wrong(
    files: WeightFiles, family: str, missing: list[str], misshapen: list[str], left_over: list[str]
) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing ({_shortened(missing)})")
    if misshapen:
        parts.append(f"{len(misshapen)} have another shape ({_shortened(misshapen, '; ')})")
    if left_over:
        parts.append(f"{len(left_over)} have no place in the model ({_shortened(left_over)})")
    prefix = _prefix_of(left_over, set(missing))
    if any(".lora_" in key or ".base_layer." in key for key in left_over):
        repair = f"It holds a LoRA adapter that is not merged with its model: {MERGE} of PEFT writes one that loads."
    elif prefix:
        repair = (
            f"The names begin with {prefix!r}, which what wrapped the model when it was saved has added: save "
            f"the model inside, with its save_pretrained."
        )
    elif {f"model.{key}" for key in left_over} & set(missing):
        repair = "It looks like the decoder alone, without its head: save the model for causal language modelling."
    elif missing == ["lm_head.weight"]:
        repair = "If its head shares the embedding, set tie_word_embeddings to true in the model's config."
    elif any(key.endswith(("_scale_inv", ".scales", ".qweight", ".weight_scale")) for key in left_over):
        repair = _QUANTISED
    elif misshapen and not missing:
        repair = "Take the sizes of the model's config from the config.json of that folder (model.path does)."
    else:
        repair = "Is it a model of this kind, and is its config.json the one that the model was built with?"
    return f"The weights in {files.folder} do not fit the {family} model: {'; '.join(parts)}. {repair}"


def _prefix_of(names: Sequence[str], wanted: set[str]) -> str:
    """What stands before a wanted name in all of `names`; empty where that is nothing, or not the same."""
    found = set()
    for name in names:
        parts = name.split(".")
        ends = (number for number in range(1, len(parts)) if ".".join(parts[number:]) in wanted)
        found.add(".".join(parts[: next(ends, 0)]))
    return f"{found.pop()}." if len(found) == 1 and "" not in found else ""


def _shortened(items: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more


@contextmanager
def _progress(files: WeightFiles, total: int, is_main: bool) -> Iterator[Callable[[int, Path], None]]:
    """Rank 0's progress: a bar on a terminal, elsewhere a line now and then."""
    if not is_main:
        yield lambda count, file: None
        return
    number = {file: index for index, file in enumerate(files.files, 1)}
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("reading weights", total=total)
            yield lambda count, file: bar.update(
                task, advance=count, description=f"reading weights, file {number[file]} of {len(files.files)}"
            )
        return
    done, started = 0, time.monotonic()
    told = started

    def tell(count: int, file: Path) -> None:
        nonlocal done, told
        done += count
        now = time.monotonic()
        if now - told >= _LINE_EVERY_S:
            told = now
            print(
                f"reading weights: file {number[file]} of {len(files.files)}, {size_in_words(done)} of "
                f"{size_in_words(total)}, {size_in_words(round(done / (now - started)))}/s",
                file=sys.stderr,
                flush=True,
            )

    yield tell
