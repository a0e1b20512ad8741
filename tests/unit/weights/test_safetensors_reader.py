"""Headers and slices of safetensors files, against the safetensors library.

Catches a file that is cut short, padded, damaged or of another kind and is read all the same, an index that does not
fit its files, and a slice that is not the one asked for.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_npu_tp.errors import CheckpointError
from lightning_npu_tp.weights.safetensors_reader import SliceReader, open_folder, read_header, runs, told_of_adapter

TENSORS = {
    "a.weight": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "b": torch.arange(60, dtype=torch.bfloat16).reshape(3, 4, 5),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "none": torch.zeros(0, 3),
    "flags": torch.tensor([True, False, True]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder)
    return str(caught.value)


def write_file(path: Path, header: Any, data: bytes = bytes(8), length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def test_a_whole_file_is_what_safetensors_reads(folder: Path) -> None:
    files = open_folder(folder)
    assert {name: (t.dtype, t.shape) for name, t in files.tensors.items()} == {
        name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()
    }
    assert files.nbytes == sum(t.nbytes for t in TENSORS.values()) and files.files == (folder / "model.safetensors",)
    reader = SliceReader()
    for name, stored in files.tensors.items():
        out = torch.empty(stored.shape, dtype=stored.dtype)
        reader.read(stored, tuple((0, n) for n in stored.shape), out)
        assert torch.equal(out, TENSORS[name])
    assert reader.bytes == files.nbytes
    reader.close()


def test_every_cut_and_every_addition_is_noticed(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in [*range(0, len(whole), 7), 8, len(whole) - 1]:
        file.write_bytes(whole[:size])
        assert "model.safetensors is damaged" in refused(folder), size
    file.write_bytes(whole + b"\0")
    assert "has more behind its end" in refused(folder)


def test_a_flipped_byte_of_the_header_is_noticed_or_changes_no_place(folder: Path) -> None:
    """A name that changed is found when the model asks for it; no other change may go by."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    places = sorted((t.start, t.nbytes, t.shape, t.dtype) for t in read_header(file).values() if t.nbytes)
    rng = random.Random(0)
    noticed = 0
    for _ in range(200):
        at, bit = rng.randrange(8 + length), rng.randrange(8)
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        try:
            found = read_header(file)
        except CheckpointError:
            noticed += 1
            continue
        sizes = sorted((t.start, t.nbytes) for t in found.values() if t.nbytes)
        # Names, the metadata, and a dtype or shape of as many bytes (F16 and I16) are what the file cannot tell.
        assert sizes == [(start, nbytes) for start, nbytes, _, _ in places], whole[at - 20 : at + 20]
    assert noticed > 100


@pytest.mark.parametrize(
    ("header", "data", "told"),
    [
        (b"{", b"", "header cannot be understood"),
        (b"[]", b"", "header cannot be understood"),
        ({"x": {"dtype": "F32", "shape": [2]}}, bytes(8), "header cannot be understood"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12), "where 0 to 8 is due"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]}}, bytes(12), "where 0 to 8 is due"),
        ({"x": {"dtype": "F64", "shape": [2], "data_offsets": [0, 8]}}, bytes(8), "where 0 to 16 is due"),
        ({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8), "shape [-2]"),
        ({"x": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, bytes(8), "header cannot be understood"),
        ({"x": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, bytes(8), "the model is quantised"),
        (
            b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "x": {"dtype": "F32", "shape": [1], '
            b'"data_offsets": [4, 8]}}',
            bytes(8),
            "a name occurs twice",
        ),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: Any, data: bytes, told: str) -> None:
    write_file(tmp_path / "model.safetensors", header, data)
    text = refused(tmp_path)
    assert told in text and "model.safetensors" in text


def test_overlapping_tensors_and_a_header_longer_than_the_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    write_file(file, {"x": entry, "y": entry})
    assert "y (F32 [2], 8 bytes) at 0 to 8, where 8 to 16 is due" in refused(tmp_path)
    write_file(file, {"x": entry}, length=1 << 60)
    assert "its header should have" in refused(tmp_path)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    assert "Git LFS pointer" in refused(tmp_path)


def test_folders_without_usable_weights(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(tmp_path / "file")
    assert "holds no weights" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "another format only (pytorch_model.bin)" in refused(tmp_path)
    save_file(TENSORS, tmp_path / "model-00001-of-00002.safetensors")
    assert "neither model.safetensors.index.json nor model.safetensors" in refused(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert f"is a link to {tmp_path}/gone, which does not exist" in refused(tmp_path)


def test_an_adapter_without_its_model_is_told(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    text = refused(tmp_path)
    assert "holds an adapter" in text and "belongs to, owner/base" in text and "merge_and_unload()" in text
    (tmp_path / "adapter_config.json").write_text("[")
    assert "belongs to, its base model" in refused(tmp_path)
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert told_of_adapter(tmp_path) == "" and open_folder(tmp_path).tensors


def test_links_are_followed(tmp_path: Path, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "blob")
    (folder / "model.safetensors").symlink_to("blob")
    assert open_folder(folder).tensors.keys() == TENSORS.keys()


def test_indices_that_do_not_fit(tmp_path: Path) -> None:
    parts = [{"a.weight": TENSORS["a.weight"]}, {"b": TENSORS["b"], "scalar": TENSORS["scalar"]}]
    names = ["one.safetensors", "two.safetensors"]
    for name, part in zip(names, parts, strict=True):
        save_file(part, tmp_path / name)
    where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = tmp_path / "model.safetensors.index.json"

    def with_map(value: Any) -> None:
        index.write_text(json.dumps({"weight_map": value}))

    with_map(where)
    assert open_folder(tmp_path).tensors.keys() == where.keys() and len(open_folder(tmp_path).files) == 2
    with_map(where | {"c": "three.safetensors"})
    assert "names the file three.safetensors, which is missing" in refused(tmp_path)
    with_map(where | {"c": "two.safetensors"})
    assert "says that c is in two.safetensors, but it is not" in refused(tmp_path)
    with_map(where | {"b": "one.safetensors"})
    assert "says that b is in one.safetensors, but it is not" in refused(tmp_path)
    with_map({key: name for key, name in where.items() if key != "b"})
    text = refused(tmp_path)
    assert "two.safetensors holds b, which model.safetensors.index.json does not name" in text
    assert "save_pretrained of transformers writes an index that fits" in text
    with_map(where | {"c": "../two.safetensors"})
    assert "lies outside of the folder" in refused(tmp_path)
    save_file(parts[0] | {"b": TENSORS["b"]}, tmp_path / "one.safetensors")
    with_map(where)
    text = refused(tmp_path)
    assert "hold b: one.safetensors and two.safetensors. Index and files are not of one kind" in text
    save_file(parts[0], tmp_path / "one.safetensors")
    save_file(parts[0], tmp_path / "model.safetensors")
    with_map(where)
    text = refused(tmp_path)
    assert "holds two models' weights: model.safetensors" in text and "Remove the one that is not meant" in text
    with_map({"a.weight": "model.safetensors"})
    assert open_folder(tmp_path).tensors.keys() == {"a.weight"}
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        assert "is damaged or no index" in refused(tmp_path)


def test_slices_are_those_of_the_whole(tmp_path: Path) -> None:
    rng = random.Random(0)
    tensors = {
        str(number): torch.rand([rng.randint(1, 7) for _ in range(rng.randint(1, 4))]).to(dtype)
        for number, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16, torch.float64] * 10)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    stored, whole = read_header(tmp_path / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    for buffer_bytes in (1 << 24, 16):
        reader = SliceReader(buffer_bytes)
        for name, tensor in whole.items():
            bounds = tuple(sorted((rng.randint(0, n), rng.randint(0, n))) for n in tensor.shape)
            bounds = tuple((a, b) for a, b in bounds)
            wanted = tensor[tuple(slice(a, b) for a, b in bounds)]
            same = torch.full(wanted.shape, 7, dtype=tensor.dtype)
            other = torch.full(wanted.shape, 7, dtype=torch.float32)
            # A view whose rows do not lie together, as a parameter's part does that is filled by one expert.
            strided = torch.full((*wanted.shape[:-1], wanted.shape[-1] + 3), 7, dtype=tensor.dtype)[..., 1:-2]
            before = reader.bytes
            for out in (same, other, strided):
                reader.read(stored[name], bounds, out)
                assert torch.equal(out, wanted.to(out.dtype))
            assert reader.bytes - before == 3 * wanted.nbytes
        reader.close()


def test_what_lies_together_is_read_in_one_go() -> None:
    assert list(runs((4, 6), ((1, 3), (0, 6)))) == [(6, 12)]
    assert list(runs((4, 6), ((1, 3), (2, 4)))) == [(8, 2), (14, 2)]
    assert list(runs((2, 3, 4), ((0, 2), (1, 2), (0, 4)))) == [(4, 4), (16, 4)]
    assert list(runs((), ())) == [(0, 1)] and list(runs((5,), ((0, 5),))) == [(0, 5)]


def test_a_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    stored = open_folder(folder).tensors["b"]
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(stored.start + 10)
    with pytest.raises(CheckpointError, match="it ended at byte"):
        SliceReader().read(stored, ((0, 3), (0, 4), (0, 5)), torch.empty(3, 4, 5, dtype=torch.bfloat16))
