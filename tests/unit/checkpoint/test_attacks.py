"""Forged checkpoints: nothing outside is read, written, run or changed, and each is refused in words and in no time.

Catches an index that sets attributes of classes or asks for gigabytes, names that lead out of the folder, a FIFO at
which a reader waits for ever, fields that are not what they are taken for, and a tokenizer that is somebody's file.
Hugging Face folders are in tests/unit/weights/test_folder_attacks.py.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from transformers import AutoModelForCausalLM

from lightning_npu_tp.checkpoint import files, training_state, writer
from lightning_npu_tp.checkpoint.manifest import Manifest, newest_complete
from lightning_npu_tp.checkpoint.peers import Peers
from lightning_npu_tp.errors import LightningNPUTPError
from lightning_npu_tp.tools.commands.inspect_command import look_at
from lightning_npu_tp.tools.testing.models import tiny_config
from lightning_npu_tp.weights.hf_export import export_checkpoint
from tests.sandbox import SECRET, Sandbox

FAMILY = "llama"
# Lightning's key, the path of the model in its module, and its own name.
NAME = "model.model.model.norm.weight"


@dataclass
class Forged:
    """A good checkpoint in `folder`, to be tampered with; `outside` holds the canary."""

    folder: Path
    outside: Path

    def index(self, change: Callable[[Metadata], object]) -> None:
        """Change the index, which is ours until then."""
        found = pickle.loads((self.folder / ".metadata").read_bytes())
        change(found)
        (self.folder / ".metadata").write_bytes(pickle.dumps(found))

    def pickled(self, content: bytes) -> None:
        (self.folder / ".metadata").write_bytes(content)

    def before(self, opcodes: bytes) -> None:
        """Have the index' pickle do something first."""
        self.pickled(b"\x80\x02" + opcodes + b"0" + (self.folder / ".metadata").read_bytes())

    def manifest(self, **fields: Any) -> None:
        """Change fields of the manifest; the rest, sizes and checksums too, is right."""
        values = {**self._sealed(), **fields}
        (self.folder / "manifest.json").write_bytes(files.sealed_json(values))

    def listed(self, name: str, **entry: Any) -> None:
        values = self._sealed()
        values["files"][name] = {"bytes": 0, "crc32": 0, **entry}
        (self.folder / "manifest.json").write_bytes(files.sealed_json(values))

    def _sealed(self) -> dict[str, Any]:
        """The manifest with the sizes and checksums of the files as they are, as an attacker would make it."""
        values = json.loads((self.folder / "manifest.json").read_text())
        del values["checksum"]
        values["files"] = {}
        for file in sorted(self.folder.iterdir()):
            if file.name == "manifest.json":
                continue
            size = file.stat().st_size
            crc32 = files.crc32_of(file) if file.is_file() and size < 1 << 28 else 0
            values["files"][file.name] = {"bytes": size, "crc32": crc32}
        return values

    def replace(self, name: str, make: Callable[[Path], object]) -> None:
        if (self.folder / name).exists():
            (self.folder / name).unlink()
        make(self.folder / name)


def packed(value: Any) -> bytes:
    """What torch.save makes of it, packed again."""
    return repacked(writer.serialized(value), lambda name, content: content, zipfile.ZIP_DEFLATED)


def repacked(content: bytes, change: Callable[[str, bytes], bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w", kind) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, change(entry.filename, source.read(entry)))
    return out.getvalue()


def pickled_inside(pickle_bytes: bytes) -> bytes:
    """A file of torch.save whose pickle is this one."""
    return repacked(writer.serialized({}), lambda name, content: pickle_bytes if name.endswith("data.pkl") else content)


class Runs:
    """Pickles into a call that makes a folder."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def nested(depth: int) -> bytes:
    """Tuples of tuples, each twice the one before: deep, and without end to whoever looks into both."""
    return b")" + b"q\x01h\x01\x86" * depth


def first_entry(index: Metadata) -> TensorStorageMetadata:
    return index.state_dict_metadata[NAME]  # type: ignore[return-value]


def first_info(index: Metadata) -> _StorageInfo:
    return next(info for place, info in index.storage_data.items() if place.fqn == NAME)


def all_paths(index: Metadata, path: str) -> None:
    for info in index.storage_data.values():
        info.relative_path = path


def resized(index: Metadata, *sizes: int) -> None:
    entry = first_entry(index)
    entry.size = entry.chunks[0].sizes = torch.Size(sizes)


def covered_twice(index: Metadata) -> None:
    entry = first_entry(index)
    half = entry.size[0] // 2
    chunk = type(entry.chunks[0])
    # The first half twice, the second not at all: the values add up.
    entry.chunks = [chunk(torch.Size([0]), torch.Size([half])), chunk(torch.Size([0]), torch.Size([half]))]
    index.storage_data[MetadataIndex(NAME, torch.Size([0]))] = first_info(index)


def overlapping(index: Metadata) -> None:
    name, entry = next((n, e) for n, e in index.state_dict_metadata.items() if len(getattr(e, "size", ())) == 2)
    rows, columns = entry.size  # type: ignore[union-attr]
    chunk, info = type(entry.chunks[0]), _info_of(index, name)  # type: ignore[union-attr]
    # Two that cross, and one that fills up the number of values.
    boxes = [((0, 0), (rows, columns // 2)), ((0, 0), (rows // 2, columns)), ((0, 0), (0, 0))]
    entry.chunks = [chunk(torch.Size(first), torch.Size(sizes)) for first, sizes in boxes]  # type: ignore[union-attr]
    for first, _ in boxes:
        index.storage_data[MetadataIndex(name, torch.Size(first))] = info


def _info_of(index: Metadata, name: str) -> _StorageInfo:
    return next(info for place, info in index.storage_data.items() if place.fqn == name)


def many_shards(index: Metadata) -> None:
    """One list of shards, which ten thousand tensors share."""
    entry = first_entry(index)
    entry.chunks = entry.chunks * 10_000
    index.state_dict_metadata |= {f"model.{number}": entry for number in range(10_000)}


def huge(path: Path, size: int) -> None:
    with open(path, "wb") as stream:
        stream.truncate(size)


EVERYWHERE = ("load", "inspect", "auto", "export")
ATTACKS: dict[str, tuple[Callable[[Forged], object], tuple[str, ...]]] = {}


def attack(name: str, forge: Callable[[Forged], object], at: tuple[str, ...] = EVERYWHERE) -> None:
    """at: which ways to use the checkpoint refuse it; the others do not come to what is forged, and do no harm."""
    ATTACKS[name] = (forge, at)


# --- the index ---------------------------------------------------------------------------------------

for name, opcodes in {
    "sets an attribute of a class": b"cpathlib\nPosixPath\nN}" + text("name") + text("x") + b"s\x86b",
    "sets an attribute of torch.Size": b"ctorch\nSize\n}" + text("numel") + text("x") + b"sb",
    "sets an attribute of an index class": b"ctorch.distributed.checkpoint.metadata\nMetadata\nN}"
    + text("x")
    + text("y")
    + b"s\x86b",
    "calls os.system": b"cos\nsystem\n" + text("true") + b"\x85R",
    "calls eval": b"\x8c\x08builtins\x8c\x04eval\x93" + text("1") + b"\x85R",
    "calls a method of an allowed module": b"ctorch\nload\n" + text("x") + b"\x85R",
    "names an attribute of a dtype": b"ctorch\nfloat32.__class__\n",
    "has a memo number of gigabytes": b"]r\xff\xff\xff\x06",
    "has bytes of gigabytes": b"\x96" + struct.pack("<Q", 1 << 34),
    "has a text of gigabytes": b"\x8d" + struct.pack("<Q", 1 << 34),
    "has a number of gigabytes": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "has an extension code": b"\x82\x01",
    "has a persistent name": b"Pname\n",
    "has a tuple as key that cannot be hashed in time": b"}" + nested(60) + b"Ns",
    "has tuples nested without end": b")" + b"\x85" * 200_000,
    "has a frame of exabytes": b"\x95" + struct.pack("<Q", 1 << 60),
    "pops more than there is": b"0000",
}.items():
    attack(f"index {name}", lambda f, opcodes=opcodes: (f.before(opcodes), f.manifest()))
for name, change in {
    "points to an absolute path": lambda i: all_paths(i, "/etc/hostname"),
    "points to the folder itself": lambda i: all_paths(i, "."),
    "points to a name with a zero byte": lambda i: all_paths(i, "a\0b"),
    "points to no file": lambda i: all_paths(i, "absent"),
    "points behind the end": lambda i: setattr(first_info(i), "offset", 10**9),
    "points before the beginning": lambda i: setattr(first_info(i), "offset", -5),
    "has a length below zero": lambda i: setattr(first_info(i), "length", -(2**40)),
    "has a length that is a text": lambda i: setattr(first_info(i), "length", "12"),
    "has shards that are unpacked": lambda i: setattr(first_info(i), "transform_descriptors", ["zstd"]),
    "has a tensor without a shard": lambda i: setattr(first_entry(i), "chunks", []),
    "has a tensor covered twice and not at all": covered_twice,
    "has shards that cross": overlapping,
    "has a shard outside of its tensor": lambda i: setattr(first_entry(i).chunks[0], "offsets", torch.Size([7])),
    "has a tensor of exabytes": lambda i: resized(i, 2**60),
    "has a tensor of more values than there are numbers": lambda i: resized(i, 2**40, 2**40),
    "has forty thousand dimensions": lambda i: resized(i, *[1] * 40_000),
    "does not say where a tensor is": lambda i: i.storage_data.clear(),
    "has shards that ten thousand tensors share": many_shards,
    "is a list of tensors": lambda i: setattr(i, "state_dict_metadata", [1, 2]),
    "has numbers for names": lambda i: setattr(i, "state_dict_metadata", {1: first_entry(i)}),
    "has a size for a dtype": lambda i: setattr(first_entry(i).properties, "dtype", torch.Size),
    "has a place of another kind": lambda i: setattr(i, "planner_data", {NAME: ({"a": 1},)}),
}.items():
    attack(f"index {name}", lambda f, change=change: (f.index(change), f.manifest()))
attack(
    "index points to a good shard above",
    lambda f: (
        shutil.copy(f.folder / "__0_0.distcp", f.outside / "shard"),
        f.index(lambda i: all_paths(i, "../../outside/shard")),
        f.manifest(),
    ),
)
attack("index is no pickle", lambda f: (f.pickled(b"{}"), f.manifest()))
attack("index is a number", lambda f: (f.pickled(pickle.dumps(5)), f.manifest()))

# --- files of another kind ---------------------------------------------------------------------------

for name in (".metadata", "__0_0.distcp", "meta.pt", "tokenizer.json"):
    # All is listed in the manifest.
    attack(f"{name} is a FIFO", lambda f, name=name: (f.replace(name, os.mkfifo), f.manifest()))
    attack(
        f"{name} is a link to a file outside",
        lambda f, name=name: (f.replace(name, lambda p: p.symlink_to(f.outside / "secret")), f.manifest()),
    )
    attack(
        f"{name} is a link to a device",
        lambda f, name=name: (f.replace(name, lambda p: p.symlink_to("/dev/zero")), f.manifest()),
    )
    attack(f"{name} is a folder", lambda f, name=name: (f.replace(name, Path.mkdir), f.manifest()))
attack("index of gigabytes", lambda f: (f.replace(".metadata", lambda p: huge(p, 1 << 31)), f.manifest()))
attack("manifest is a FIFO", lambda f: f.replace("manifest.json", os.mkfifo))
attack(
    "manifest is a link out",
    lambda f: (
        f.replace("manifest.json", lambda p: p.symlink_to(shutil.copy(f.folder / "meta.pt", f.outside / "manifest")))
        if (f.folder / "meta.pt").exists()
        else None
    ),
)
attack("manifest is a device", lambda f: f.replace("manifest.json", lambda p: p.symlink_to("/dev/zero")))
attack("manifest of gigabytes", lambda f: f.replace("manifest.json", lambda p: huge(p, 1 << 32)))

# --- fields of the manifest --------------------------------------------------------------------------

for name, entry in {
    "../../outside/secret": {},
    "/etc/hostname": {},
    "..": {},
    "a\0b": {},
    "meta.pt": {"bytes": -1},
    "rank_0.pt": {"bytes": "12"},
    "__0_0.distcp": {"crc32": None},
}.items():
    attack(f"manifest lists {name!r} {entry}", lambda f, name=name, entry=entry: f.listed(name, **entry))
for name, fields in {
    "step of four hundred digits": {"step": int("9" * 400)},
    "step below zero": {"step": -1},
    "step that is no number": {"step": "many"},
    "step that is a truth": {"step": True},
    "epoch that is a list": {"epoch": [1]},
    "world of too many ranks": {"world": 10**12},
    "layout that is a list": {"layout": ["data"]},
    "layout of no ranks": {"layout": {"data": 0}},
    "models that are a list": {"models": [1]},
    "model without a config": {"models": {"model": {"family": "llama", "config": "x", "dtype": "", "parameters": 1}}},
    "tokenizer that is a text": {"tokenizer": "/etc/passwd"},
    "tokenizer with a number for a path": {"tokenizer": {"name": "x", "path": 5, "vocab_size": 1, "fingerprint": "x"}},
    "contents that are a number": {"contents": 5},
    "versions that are numbers": {"versions": {"torch": 5}},
    "files that are a list": {"files": ["meta.pt"]},
    "date that is none": {"created": "yesterday"},
    "date that is a list": {"created": []},
    "format that is a text": {"format": "one"},
    "format of the far future": {"format": 10**30},
    "no format": {"format": None},
}.items():
    attack(f"manifest has a {name}", lambda f, fields=fields: f.manifest(**fields))


def raw_manifest(forged: Forged, more: str) -> None:
    """A manifest of this text, with the right checksum."""
    blank = '{"format": 1, ' + more + '\n  "checksum": "00000000"\n}\n'
    value = files.zlib.crc32(blank.encode())
    (forged.folder / "manifest.json").write_text(blank.replace('"00000000"', f'"{value:08x}"'))


attack("manifest is nested too deep", lambda f: raw_manifest(f, '"layout": ' + "[" * 10**5 + "]" * 10**5 + ","))
attack("manifest has a number of a million digits", lambda f: raw_manifest(f, '"step": ' + "9" * 10**6 + ","))
attack("manifest is cut", lambda f: (f.folder / "manifest.json").write_bytes(b'{"format": 1'))

# --- the rest of the state ---------------------------------------------------------------------------

LOADS = ("load",)
for name, content in {
    "runs code": lambda f: writer.serialized({"global_step": Runs(f.outside / "ran")}),
    "unpacks to gigabytes": lambda f: packed({"a": torch.zeros(1 << 22)}),
    "asks for a bytearray of gigabytes": lambda f: pickled_inside(
        b"\x80\x02}" + text("a") + b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x40\x00\x85Rs."
    ),
    "is a list": lambda f: writer.serialized([1, 2]),
    "is no archive": lambda f: b"\x80\x02}.",
    "has a storage larger than its file": lambda f: repacked(
        writer.serialized({"a": torch.arange(3000.0)}), lambda n, c: c.replace(b"M\xb8\x0b", b"J\x00\x00\x00\x40")
    ),
}.items():
    attack(
        f"meta.pt {name}",
        lambda f, content=content: ((f.folder / "meta.pt").write_bytes(content(f)), f.manifest()),
        LOADS,
    )


def forged_shard(forged: Forged, value: Any) -> None:
    """Put another object where the index says that a tensor is."""
    index = pickle.loads((forged.folder / ".metadata").read_bytes())
    info, file = first_info(index), forged.folder / "__0_0.distcp"
    content = value if isinstance(value, bytes) else writer.serialized(value)
    info.offset, info.length = file.stat().st_size, len(content)
    file.write_bytes(file.read_bytes() + content)
    (forged.folder / ".metadata").write_bytes(pickle.dumps(index))
    forged.manifest()


READS = ("load", "export")
attack("shard is packed", lambda f: forged_shard(f, packed(torch.zeros(64))), READS)
attack("shard runs code", lambda f: forged_shard(f, Runs(f.outside / "ran")), READS)
attack("shard is of another shape", lambda f: forged_shard(f, torch.zeros(3, 5)), READS)
attack("shard is no tensor", lambda f: forged_shard(f, {"a": list(range(99))}), READS)

# --- tokenizer and config, which an export uses ----------------------------------------------------------

EXPORTS = ("export",)
KNOWN = {"name": "x", "source": None, "vocab_size": 3, "fingerprint": "x"}
attack("tokenizer outside", lambda f: f.manifest(tokenizer=KNOWN | {"path": str(f.outside)}), EXPORTS)
attack("tokenizer file outside", lambda f: f.manifest(tokenizer=KNOWN | {"path": str(f.outside / "secret")}), EXPORTS)
attack("tokenizer above", lambda f: f.manifest(tokenizer=KNOWN | {"path": "../../outside"}), EXPORTS)
attack("tokenizer of the root", lambda f: f.manifest(tokenizer=KNOWN | {"path": "/"}), EXPORTS)
attack(
    "tokenizer that is another file",
    lambda f: ((f.folder / "tokenizer.json").write_text("root:x:0:0"), f.manifest()),
    EXPORTS,
)


def unlisted(forged: Forged) -> None:
    forged.manifest()
    (forged.folder / "tokenizer_config.json").symlink_to(forged.outside / "secret")


attack("tokenizer file that the manifest does not list", unlisted, EXPORTS)


def with_config(forged: Forged, **values: Any) -> None:
    about = json.loads((forged.folder / "manifest.json").read_text())["models"]
    about["model"]["config"] |= values
    forged.manifest(models=about)


for name, values in {
    "a billion layers": {"num_hidden_layers": 10**9},
    "a billion labels": {"num_labels": 10**9},
    "layers as a text": {"num_hidden_layers": "two"},
    "a model type that is a path": {"model_type": "../../etc"},
    "a vocabulary that is a text": {"vocab_size": "all"},
    "a size below zero": {"hidden_size": -64},
    "heads of which there are none": {"num_attention_heads": 0},
    "a size of too many digits": {"intermediate_size": 10**40},
}.items():
    attack(f"config has {name}", lambda f, values=values: with_config(f, **values), EXPORTS)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("good") / "step=9.ckpt"
    config = tiny_config(FAMILY)
    weights = {f"model.{name}": value for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()}
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    about = {
        "family": FAMILY,
        "config": json.loads(json.dumps(config.to_dict(), default=str)),
        "dtype": "float32",
        "parameters": sum(value.numel() for value in weights.values()),
    }
    manifest = Manifest(step=9, models={"model": about}, tokenizer=KNOWN | {"path": "."})
    tensors, rest = training_state.split({"state_dict": weights, "global_step": 9, "epoch": 0})
    more = {"tokenizer.json": tokenizer.to_str().encode()}
    content = writer.serialized(rest)
    writer.save_folder(tensors, content, writer.serialized({}), folder, manifest, Peers(), more)
    # Once without a watch: what is imported on the way is not the stranger's.
    for use in USES.values():
        use(folder, folder.parent / "out")
    return folder


def load(path: Path, out: Path) -> str:
    module = torch.nn.Module()
    module.model = AutoModelForCausalLM.from_config(tiny_config(FAMILY))
    training_state.load(path, module, [], strict=True, weights_only=None)
    return ""


def inspected(path: Path, out: Path) -> str:
    return "; ".join(look_at(path, checksums=True).problems)


def auto(path: Path, out: Path) -> str:
    told: list[str] = []
    found = newest_complete(path.parent, skipped=lambda path, reason: told.append(reason), checksums=True)
    return "; ".join(told) if found != path else ""


def exported(path: Path, out: Path) -> str:
    done = export_checkpoint(path, out / "hf")
    shutil.rmtree(out / "hf", ignore_errors=True)
    return "; ".join(done.differences)


USES: dict[str, Callable[[Path, Path], str]] = {
    "load": load,
    "inspect": inspected,
    "auto": auto,
    "export": exported,
}
CLASSES = (pathlib.PosixPath, pathlib.PurePath, Metadata, MetadataIndex, TensorStorageMetadata, _StorageInfo)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_forged_checkpoint_does_nothing_and_is_refused_in_words(name: str, good: Path, tmp_path: Path) -> None:
    folder, outside, out = tmp_path / "run" / "forged.ckpt", tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    out.mkdir()
    (outside / "secret").write_text(SECRET)
    shutil.copytree(good, folder)
    forge, refused_at = ATTACKS[name]
    forge(Forged(folder, outside))
    before = sorted(outside.iterdir())
    classes = {kind: dict(vars(kind)) for kind in CLASSES}
    for use, run in USES.items():
        sandbox = Sandbox(folder.parent, out, outside)
        told = ""
        with sandbox.watching():
            try:
                told = run(folder, out)
            except LightningNPUTPError as error:
                told = str(error)
        assert sandbox.broken == [], use
        # Locks of an export are made beside the checkpoint, and are gone.
        assert {path.name for path in folder.parent.iterdir()} == {"forged.ckpt"}
        if use in refused_at:
            assert len(told) > 40 and "Traceback" not in told, f"{use} takes it"
        assert SECRET not in told and sandbox.secrets() == []
        assert sorted(outside.iterdir()) == before and (outside / "secret").read_text() == SECRET
        assert {kind: dict(vars(kind)) for kind in CLASSES} == classes


def test_a_good_checkpoint_is_taken_by_all(good: Path, tmp_path: Path) -> None:
    for use, run in USES.items():
        assert run(good, tmp_path) == "", use


def test_there_are_at_least_sixty_attacks() -> None:
    assert len(ATTACKS) >= 60
