"""Hugging Face folders that a stranger made: nothing outside is read, and each is refused in words and in no time.

Catches an index that leads out of the folder, a FIFO or a device in a file's place, and headers whose sizes take
seconds to multiply. What a folder lacks or has too much of is in test_safetensors_reader.py, checkpoints are in
tests/unit/checkpoint/test_attacks.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_npu_tp.errors import LightningNPUTPError
from lightning_npu_tp.weights.safetensors_reader import open_folder
from tests.sandbox import SECRET, Sandbox

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def header(folder: Path, content: Any, data: bytes = bytes(8)) -> None:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data)


def one(**values: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | values}


def index(folder: Path, where: Any) -> None:
    (folder / SINGLE).rename(folder / "part.safetensors")
    (folder / INDEX).write_text(where if isinstance(where, str) else json.dumps({"weight_map": where}))


def instead(file: Path, make: Callable[[Path], object]) -> None:
    file.unlink(missing_ok=True)
    make(file)


ATTACKS: dict[str, Callable[[Path], object]] = {
    "shape of forty thousand sizes": lambda f: header(f, one(shape=[2**62] * 40_000)),
    "shape of many numbers of many digits": lambda f: header(f, one(shape=[int("9" * 4000)] * 60)),
    "shape of sizes whose product is endless": lambda f: header(f, one(shape=[2**62] * 64)),
    "shape of nested lists": lambda f: header(f, one(shape=[[[]]] * 64)),
    "shape of truths": lambda f: header(f, one(shape=[True, 2])),
    "offsets below zero": lambda f: header(f, one(data_offsets=[-8, 0])),
    "offsets of fractions": lambda f: header(f, one(data_offsets=[0.0, 8.0])),
    "offsets behind the end": lambda f: header(f, one(shape=[2**40], data_offsets=[0, 2**42])),
    "header of gigabytes": lambda f: (f / SINGLE).write_bytes((2**34).to_bytes(8, "little") + b"{}"),
    "header of a number of digits": lambda f: header(f, b'{"a": ' + b"9" * 10**6 + b"}"),
    "header nested too deep": lambda f: header(f, b"[" * 10**6),
    "header of tables nested too deep": lambda f: header(f, b'{"a":' * 10**5),
    "header that is no text": lambda f: header(f, b"\xff\xfe" * 100),
    "name of a megabyte": lambda f: header(f, {"a" * 10**6: {"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}}),
    "dtype of a megabyte": lambda f: header(f, one(dtype="F" * 10**6)),
    "names that lie over each other": lambda f: header(f, one() | {"b": one()["a"]}),
    "file that is a FIFO": lambda f: instead(f / SINGLE, os.mkfifo),
    "file that is a device": lambda f: instead(f / SINGLE, lambda p: p.symlink_to("/dev/zero")),
    "file that is a folder": lambda f: instead(f / SINGLE, Path.mkdir),
    "index that leads above": lambda f: index(f, {"a": "../outside/secret"}),
    "index that leads to the root": lambda f: index(f, {"a": "/etc/hostname"}),
    "index of a name with a zero byte": lambda f: index(f, {"a": "a\0b"}),
    "index of the folder itself": lambda f: index(f, {"a": "."}),
    "index of numbers": lambda f: index(f, {"a": 5}),
    "index of a list": lambda f: index(f, ["a"]),
    "index nested too deep": lambda f: index(f, '{"weight_map": ' + "[" * 10**6),
    "index of a FIFO": lambda f: (index(f, {"a": "part.safetensors"}), instead(f / "part.safetensors", os.mkfifo)),
    "index that is a FIFO": lambda f: (index(f, {}), instead(f / INDEX, os.mkfifo), (f / SINGLE).mkdir()),
    "index that is a device": lambda f: (
        index(f, {}),
        instead(f / INDEX, lambda p: p.symlink_to("/dev/zero")),
        (f / SINGLE).mkdir(),
    ),
    "index of gigabytes": lambda f: (index(f, {}), os.truncate(f / INDEX, 1 << 32)),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_forged_folder_does_nothing_and_is_refused_in_words(name: str, tmp_path: Path) -> None:
    folder, outside, out = tmp_path / "model", tmp_path / "outside", tmp_path / "out"
    for path in (folder, outside, out):
        path.mkdir()
    (outside / "secret").write_text(SECRET)
    save_file({"a": torch.ones(2)}, folder / SINGLE)
    ATTACKS[name](folder)
    sandbox = Sandbox(folder, out, outside)
    with sandbox.watching(), pytest.raises(LightningNPUTPError) as caught:
        open_folder(folder)
    assert sandbox.broken == []
    told = str(caught.value)
    assert str(folder) in told and 40 < len(told) < 2000 and SECRET not in told
    assert list(out.iterdir()) == [] and [path.name for path in outside.iterdir()] == ["secret"]
