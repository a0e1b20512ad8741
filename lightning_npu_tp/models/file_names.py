"""One table between names in Hugging Face files and names in the model, read in both directions.

Published mixtures of experts store every expert's matrices by themselves; transformers' classes, and so this
package's models, hold them stacked. A `KeyTable` says for each such parameter which tensors of the files it is
made of, and where each lies in it; any other parameter has its own name in the files. Reading fills parameters
by it, export cuts them by it, so neither can know a name that the other does not. Shapes and names only: no
file is opened here.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lightning_npu_tp.errors import CheckpointError

Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Stacked:
    """A parameter [E, parts * rows, columns] that the files hold as one tensor [rows, columns] per expert and part.

    parameter: pattern of its name; `*` stands for whatever comes before.
    keys:      patterns of the tensors, one per part in the order in which they lie in dim 1; `*` is the same
               text, `#` the expert's number.
    """

    parameter: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Renamed:
    """A parameter that the files hold whole under another name; `*` stands for the same text in both."""

    parameter: str
    key: str


@dataclass(frozen=True)
class Ignored:
    """Tensors of the files that the model has no use for, and why; a regular pattern of `fnmatch`."""

    key: str
    why: str


@dataclass(frozen=True)
class Piece:
    """One tensor of the files and where it lies in a parameter.

    key:     its name in the files.
    shape:   its shape there.
    bounds:  (first, one past the last) index per dimension of the parameter that it covers.
    stacked: whether the parameter has one dimension more, in front.
    """

    key: str
    shape: tuple[int, ...]
    bounds: Bounds
    stacked: bool = False

    def overlap(self, wanted: Bounds) -> tuple[Bounds, Bounds] | None:
        """What of the piece a part of the parameter needs.

        wanted: bounds of that part in the parameter.

        Returns the bounds in the piece (as many as it has dimensions) and in the part (as many as the
        parameter has), or None where they do not meet.
        """
        common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(self.bounds, wanted, strict=True))
        if any(start >= stop for start, stop in common):
            return None
        inside = tuple((start - own[0], stop - own[0]) for (start, stop), own in zip(common, self.bounds, strict=True))
        target = tuple((start - part[0], stop - part[0]) for (start, stop), part in zip(common, wanted, strict=True))
        return (inside[1:] if self.stacked else inside), target


@dataclass(frozen=True)
class KeyTable:
    """The names that one model family's files use; without entries they are those of the model."""

    entries: Sequence[Stacked | Renamed] = ()
    ignored: Sequence[Ignored] = ()

    def pieces(self, name: str, shape: Sequence[int]) -> list[Piece]:
        """The tensors of the published files that make up parameter `name` of global `shape`, in its order."""
        for entry in self.entries:
            if fnmatchcase(name, entry.parameter):
                return _pieces_of(entry, name, tuple(shape))
        return [_whole(name, shape)]

    def spellings(self, name: str, shape: Sequence[int]) -> list[list[Piece]]:
        """Every way in which files may hold the parameter: the published one first, then its own name."""
        published, own = self.pieces(name, shape), [_whole(name, shape)]
        return [published] if published == own else [published, own]

    def find(self, name: str, shape: Sequence[int], available: Container[str]) -> list[Piece]:
        """The first spelling of which the files hold anything; the published one where they hold nothing."""
        spellings = self.spellings(name, shape)
        return next((pieces for pieces in spellings if any(p.key in available for p in pieces)), spellings[0])

    def why_ignored(self, key: str) -> str | None:
        """The reason why a tensor of the files is not used, or None where there is none."""
        return next((rule.why for rule in (*self.ignored, *ALWAYS_IGNORED) if fnmatchcase(key, rule.key)), None)


# Old files hold buffers that are computed from the config now.
ALWAYS_IGNORED = (
    Ignored("*.rotary_emb.inv_freq", "rotation frequencies follow from the config"),
    Ignored("*.self_attn.masked_bias", "the causal mask is computed"),
)


def _whole(key: str, shape: Sequence[int]) -> Piece:
    return Piece(key, tuple(shape), tuple((0, size) for size in shape))


def _pieces_of(entry: Stacked | Renamed, name: str, shape: tuple[int, ...]) -> list[Piece]:
    lead = name.removesuffix(entry.parameter.removeprefix("*"))
    if isinstance(entry, Renamed):
        return [_whole(entry.key.replace("*", lead), shape)]
    experts, stacked_rows, columns = shape
    rows, rest = divmod(stacked_rows, len(entry.keys))
    if rest:
        raise CheckpointError(
            f"{name} of shape {shape} cannot be made of {len(entry.keys)} equal parts ({', '.join(entry.keys)}). "
            f"Correct the keys of its ModelFamily."
        )
    return [
        Piece(
            key=key.replace("*", lead).replace("#", str(expert)),
            shape=(rows, columns),
            bounds=((expert, expert + 1), (part * rows, (part + 1) * rows), (0, columns)),
            stacked=True,
        )
        for expert in range(experts)
        for part, key in enumerate(entry.keys)
    ]


def all_pieces(table: KeyTable, shapes: Iterable[tuple[str, Sequence[int]]]) -> dict[str, list[Piece]]:
    """Parameter name -> its published pieces, for every (name, shape); CheckpointError where two claim one key."""
    found = {name: table.pieces(name, shape) for name, shape in shapes}
    owner: dict[str, str] = {}
    for name, pieces in found.items():
        for piece in pieces:
            if owner.setdefault(piece.key, name) != name:
                raise CheckpointError(f"{owner[piece.key]} and {name} both want {piece.key}. Correct the key table.")
    return found
