"""Random input for every parser of what others write: words or a result, never a raw exception, never long or large.

FUZZ_INPUTS: inputs for each parser, 1,000 by default; then always the same ones. `make fuzz` tries 20,000 new ones.
Each is a good input with changes, or of the kind that the parser expects first. Catches an exception that is not this
package's own, time that grows faster than the input, and memory that a number in the input asks for.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_npu_tp import HcclSettings
from lightning_npu_tp.checkpoint import files, training_state, writer
from lightning_npu_tp.checkpoint.index import read_index
from lightning_npu_tp.checkpoint.manifest import Manifest, age_key, incomplete, parse_manifest
from lightning_npu_tp.checkpoint.peers import Peers
from lightning_npu_tp.devices.fault_text import called, mentioned, reads_like_lost_peer
from lightning_npu_tp.errors import LightningNPUTPError
from lightning_npu_tp.estimates.what_fits import read_numbers
from lightning_npu_tp.tools.model_config import read_model_config
from lightning_npu_tp.tools.testing.models import tiny_config
from lightning_npu_tp.weights.safetensors_reader import open_folder
from lit_models.data import cache

INPUTS = int(os.environ.get("FUZZ_INPUTS", "1000"))
MOST_S, MOST_MIB = 2.0, 256
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**53, 2**62, 2**63, 2**64, 10**30, 10**400, -(2**63), True, False, 0.5, 1e308]),
)
# Half a surrogate pair is a text to json, and to nothing else.
ODD = ["", ".", "..", "../x", "/etc/passwd", "a\0b", "\ud800", "meta.pt"]
TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(ODD))
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)


def changed(good: bytes) -> st.SearchStrategy[bytes]:
    """A good input with some bytes changed, left out, doubled, or cut short."""
    place = st.integers(0, max(0, len(good) - 1))
    edit = st.tuples(st.sampled_from(["set", "drop", "double", "cut"]), place, st.integers(0, 255), st.integers(1, 40))

    def apply(edits: list[tuple[str, int, int, int]]) -> bytes:
        out = bytearray(good)
        for kind, at, value, length in edits:
            if kind == "set" and at < len(out):
                out[at] = value
            elif kind == "drop":
                del out[at : at + length]
            elif kind == "double":
                out[at:at] = out[at : at + length]
            elif kind == "cut" and value < 8:
                del out[at:]
        return bytes(out)

    return st.lists(edit, min_size=1, max_size=6).map(apply)


def with_fields(good: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A good table, some of whose fields, or fields of fields, are something else."""

    def apply(changes: list[tuple[list[int], Any]]) -> dict[str, Any]:
        out = json.loads(json.dumps(good))
        for path, value in changes:
            node: Any = out
            for step in path[:-1]:
                keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
                if not keys or not isinstance(node[keys[step % len(keys)]], dict | list):
                    break
                node = node[keys[step % len(keys)]]
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if keys:
                node[keys[path[-1] % len(keys)]] = value
        return out

    return st.lists(
        st.tuples(st.lists(st.integers(0, 30), min_size=1, max_size=4), VALUES), min_size=1, max_size=3
    ).map(apply)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


# --- each parser: inputs made from a folder of good ones, and what reads one ---------------------------------------


def header(folder: Path) -> tuple[st.SearchStrategy[bytes], Callable[[bytes], object]]:
    good = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }

    def read(content: bytes) -> object:
        (folder / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + bytes(32))
        return open_folder(folder)

    return st.one_of(with_fields(good).map(as_json), changed(as_json(good)), VALUES.map(as_json), st.binary()), read


def index(folder: Path) -> tuple[st.SearchStrategy[bytes], Callable[[bytes], object]]:
    good = {"metadata": {"total_size": 1}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}

    def read(content: bytes) -> object:
        (folder / "model.safetensors.index.json").write_bytes(content)
        return open_folder(folder)

    return st.one_of(with_fields(good).map(as_json), changed(as_json(good)), VALUES.map(as_json), st.binary()), read


def small_checkpoint(folder: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"state_dict": training_state.model_state(model), "optimizer_states": [], "global_step": 1}
    state["optimizer_states"] = [training_state.optimizer_state(model, optimizer)]
    tensors, rest = training_state.split(state)
    about = {"family": "llama", "config": {"model_type": "llama"}, "dtype": "float32", "parameters": 8}
    known = {"name": "x", "path": ".", "source": None, "vocab_size": 2, "fingerprint": "y"}
    manifest = Manifest(step=1, layout={"data": 1}, models={"m": about}, tokenizer=known, versions={"torch": "2"})
    writer.save_folder(tensors, writer.serialized(rest), writer.serialized({}), folder, manifest, Peers())


def manifest(folder: Path) -> tuple[st.SearchStrategy[bytes], Callable[[bytes], object]]:
    small_checkpoint(folder / "a.ckpt")
    good = json.loads((folder / "a.ckpt" / "manifest.json").read_text())
    del good["checksum"]

    def read(content: bytes) -> object:
        (folder / "a.ckpt" / "manifest.json").write_bytes(content)
        incomplete(folder / "a.ckpt")
        age_key(folder / "a.ckpt")
        return parse_manifest(folder / "a.ckpt")

    sealed = with_fields(good).map(files.sealed_json)
    return st.one_of(sealed, sealed, changed(files.sealed_json(good)), st.binary()), read


def dcp_index(folder: Path) -> tuple[st.SearchStrategy[bytes], Callable[[bytes], object]]:
    small_checkpoint(folder / "a.ckpt")
    good = (folder / "a.ckpt" / ".metadata").read_bytes()
    # In a form without frames, in which a change in length is no end.
    flat = pickle.dumps(pickle.loads(good), 2)

    def read(content: bytes) -> object:
        (folder / "a.ckpt" / ".metadata").write_bytes(content)
        return read_index(folder / "a.ckpt")

    codes = st.lists(
        st.sampled_from([bytes([code]) for code in range(256)] + [b"X\x01\x00\x00\x00a", b"K\x05", b"h\x03"])
    )
    return st.one_of(changed(flat), changed(flat), changed(good), codes.map(b"".join), st.binary()), read


def config(folder: Path) -> tuple[st.SearchStrategy[bytes], Callable[[bytes], object]]:
    good = {"model_type": "llama"} | json.loads(json.dumps(tiny_config("llama").to_diff_dict(), default=str))

    def read(content: bytes) -> object:
        (folder / "config.json").write_bytes(content)
        return read_model_config(str(folder))

    return st.one_of(with_fields(good).map(as_json), changed(as_json(good)), VALUES.map(as_json), st.binary()), read


def token_cache(folder: Path) -> tuple[st.SearchStrategy[bytes], Callable[[bytes], object]]:
    def build(target: Path) -> dict[str, Any]:
        (target / "tokens").write_bytes(bytes(100))
        return {"tokens": 50, "documents": [1, 2]}

    target, _ = cache.open_or_build(folder, "key", build)
    (notes,) = (file for file in target.iterdir() if file.suffix == ".json")
    good = json.loads(notes.read_text())
    del good["checksum"]

    def read(content: bytes) -> object:
        notes.write_bytes(content)
        return cache._checked(target)

    sealed = with_fields(good).map(files.sealed_json)
    return st.one_of(sealed, sealed, changed(files.sealed_json(good)), st.binary()), read


FRAGMENTS = (
    "error code is 507015, tag[x] ERR02200 DIST call aclnnAdd failed ret:  = EI0002 Tried to allocate 1.5 GiB of which "
    "free result timed out after 1800 ms connection reset HCCL function error: a::b( rank 3 [ ] :: 1 . \t \n"
).split(" ")


def fault(folder: Path) -> tuple[st.SearchStrategy[str], Callable[[str], object]]:
    def read(text: str) -> object:
        read_numbers(text)
        return mentioned(text), called(text), reads_like_lost_peer(text)

    some = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=5)), max_size=30)
    joined = st.builds(lambda parts, between: between.join(parts), some, st.sampled_from([" ", "", ": ", "  ", "\n"]))
    # A dump repeats itself; a megabyte of it now and then.
    long = st.builds(lambda text, size: (text * (size // max(1, len(text)) + 1))[:size], joined, st.integers(1, 3000))
    return st.one_of(joined, long), read


def hccl(folder: Path) -> tuple[st.SearchStrategy[dict[str, Any]], Callable[[dict[str, Any]], object]]:
    names = [field.name for field in fields(HcclSettings)]

    def read(values: dict[str, Any]) -> object:
        return HcclSettings(**values).apply({})

    return st.dictionaries(st.sampled_from(names), VALUES, max_size=4), read


PARSERS: dict[str, Callable[[Path], tuple[st.SearchStrategy[Any], Callable[[Any], object]]]] = {
    "safetensors header": header,
    "safetensors index": index,
    "manifest": manifest,
    "dcp index": dcp_index,
    "config": config,
    "token cache": token_cache,
    "fault text": fault,
    "hccl": hccl,
}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("name", PARSERS)
def test_no_input_makes_a_parser_fail_hang_or_swell(name: str, tmp_path: Path) -> None:
    inputs, read = PARSERS[name](tmp_path)
    seen = 0

    @settings(
        max_examples=INPUTS,
        deadline=None,
        database=None,
        derandomize="FUZZ_INPUTS" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def each(value: Any) -> None:
        nonlocal seen
        seen += 1
        memory, start = peak_mib(), time.process_time()
        try:
            read(value)
        except LightningNPUTPError as error:
            assert len(str(error)) > 20
        took, grew = time.process_time() - start, peak_mib() - memory
        assert took < MOST_S and grew < MOST_MIB, f"{took:.1f} s, {grew:.0f} MiB"

    each()
    assert seen >= INPUTS * 0.9


@pytest.mark.parametrize("unit", ["tag[", "result", "1"])
def test_an_error_text_of_a_megabyte_is_read_at_once(unit: str) -> None:
    for text in ((unit * 10**6)[: 10**6], unit + " " * 10**6, unit + "1" * 10**6):
        for read in (mentioned, called, reads_like_lost_peer, read_numbers):
            start = time.process_time()
            read(text)
            assert time.process_time() - start < MOST_S, read.__name__


def test_a_code_at_the_end_of_a_long_text_is_found() -> None:
    assert [fault.code for fault in mentioned("x" * 10**6 + " error code is 507015")] == ["507015"]
