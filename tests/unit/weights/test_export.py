"""Export on one process: the command, its refusals, and what it does not let pass.

Catches a folder that is left although it is not right or not whole, memory that grows with the model, an index that
does not say where tensors are, a selection bias that is lost without a word, and an existing folder written over.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from lightning_npu_tp.checkpoint import training_state
from lightning_npu_tp.errors import CheckpointError, ConfigError
from lightning_npu_tp.tools.commands.export_command import bytes_of, export
from lightning_npu_tp.tools.testing.models import tiny_config
from lightning_npu_tp.weights import hf_export as exporting
from lightning_npu_tp.weights import hf_folder, row_runs
from lightning_npu_tp.weights.safetensors_shards import Shards
from lightning_npu_tp.weights.sources import FolderSource

FAMILY = "qwen3_moe"


def checkpoint(folder: Path, *, sharded: bool = True, **extra: torch.Tensor) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of a tiny model as LitCausalLM leaves it, and its weights."""
    config = tiny_config(FAMILY)
    weights = {f"model.{name}": value for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()}
    weights |= extra
    content = {
        "state_dict": dict(weights),
        "hyper_parameters": {"architecture": FAMILY, "config": config.to_diff_dict()},
        "epoch": 0,
        "global_step": 3,
    }
    if sharded:
        training_state.save_sharded(content, folder / "c.ckpt", is_main=True)
    else:
        torch.save(content, folder / "c.ckpt")
    return folder / "c.ckpt", weights


def command(*arguments: Any) -> Any:
    app = typer.Typer()
    app.command()(export)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("sharded", [True, False], ids=["folder", "one file"])
def test_the_command_says_how_many_tensors_are_equal(tmp_path: Path, sharded: bool) -> None:
    path, weights = checkpoint(tmp_path, sharded=sharded)
    done = command(path, tmp_path / "out", "--max-shard-size", "40KB", "--tokenizer", "none")
    assert done.exit_code == 0, done.output
    tensors = 3 + 2 * 8 + 3 + 1 + 8 * 3
    assert f"{tensors} tensors" in done.output and f"all {tensors} equal to the checkpoint, bit for bit" in done.output
    assert f"all {len(weights)} of its tensors equal too" in done.output
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    for key, file in index["weight_map"].items():
        assert key in load_file(tmp_path / "out" / file)
    sizes = [sum(t.nbytes for t in load_file(f).values()) for f in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 2 and max(sizes) <= 40_000 and sum(sizes) == index["metadata"]["total_size"]
    assert not list(tmp_path.glob(".*"))


def test_another_dtype_is_the_checkpoints_weights_rounded(tmp_path: Path) -> None:
    path, weights = checkpoint(tmp_path)
    assert command(path, tmp_path / "out", "--dtype", "bfloat16", "--tokenizer", "none").exit_code == 0
    after = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(after["lm_head.weight"], weights["model.lm_head.weight"].bfloat16())
    up = weights["model.model.layers.1.mlp.experts.gate_up_proj"][5, 16:].bfloat16()
    assert torch.equal(after["model.layers.1.mlp.experts.5.up_proj.weight"], up)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_runs_of_rows_make_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = checkpoint(tmp_path)
    exporting.export_checkpoint(path, tmp_path / "at_once", with_tokenizer=False)
    asked: list[int] = []
    read = FolderSource.read
    monkeypatch.setattr(
        FolderSource,
        "read",
        lambda self, name, bounds: asked.append(read(self, name, bounds).nbytes) or read(self, name, bounds),
    )
    monkeypatch.setattr(row_runs, "CHUNK_BYTES", 1000)
    exporting.export_checkpoint(path, tmp_path / "in_runs", with_tokenizer=False)
    one_expert = 4 * 32 * 48
    assert max(asked) == one_expert, "more than a run of rows was read at once"
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("at_once", "in_runs"))
    assert first == second


def test_what_the_folder_cannot_hold_is_named(tmp_path: Path) -> None:
    zero, moved = torch.zeros(8), torch.tensor([0.0] * 7 + [0.1])
    name = "model.model.layers.1.mlp.gate.e_score_correction_bias"
    path, _ = checkpoint(tmp_path, **{name: moved, "head.weight": torch.ones(2)})
    done = command(path, tmp_path / "out", "--tokenizer", "none")
    assert done.exit_code == 0 and f"{name} is not zero and is left out" in done.output
    assert "not part of Qwen3MoeForCausalLM: head.weight." in done.output
    shutil.rmtree(path)
    path, _ = checkpoint(tmp_path, **{name: zero})
    assert "left out" not in command(path, tmp_path / "again", "--tokenizer", "none").output


def test_a_difference_is_exit_1_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = checkpoint(tmp_path)
    key = "model.layers.1.mlp.experts.5.up_proj.weight"
    write = exporting.write_side_files

    def damage(folder: Path, *arguments: Any) -> None:
        write(folder, *arguments)
        tensors = load_file(folder / "model.safetensors")
        tensors[key][3, 4] += 1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(exporting, "write_side_files", damage)
    done = command(path, tmp_path / "out", "--tokenizer", "none")
    assert done.exit_code == 1 and f"{key} in the files" in done.output
    assert "model.layers.1.mlp.experts.gate_up_proj as transformers loads it" in done.output
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_name_table_that_swaps_two_parts_is_found_by_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from lightning_npu_tp.models.families.common import expert_keys
    from lightning_npu_tp.models.families.registry import family_named
    from lightning_npu_tp.models.file_names import KeyTable

    wrong = KeyTable(expert_keys("*.mlp.experts", gate="up_proj", up="gate_proj"))
    family = replace(family_named(FAMILY), keys=lambda config: wrong)
    path, _ = checkpoint(tmp_path)
    done = exporting.export_checkpoint(path, tmp_path / "out", with_tokenizer=False, families=[family])
    assert done.compared == done.tensors, "the files hold what the table says"
    assert done.differences == ["model.layers.1.mlp.experts.gate_up_proj as transformers loads it"]


def test_where_it_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = checkpoint(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
        done = command(path, tmp_path / "out", "--tokenizer", "none")
        assert done.exit_code == 1 and "The export needs" in done.output and "1,000 are free" in done.output
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1000))
    done = command(path, tmp_path / "out", "--tokenizer", "none")
    assert done.exit_code == 0 and "Not loaded through transformers" in done.output and "bit for bit" in done.output


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = checkpoint(tmp_path)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_side_files", full)
    done = command(path, tmp_path / "out", "--tokenizer", "none")
    assert done.exit_code == 1 and "No space left on device. It needs" in done.output
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        done = command(path, tmp_path / "out", "--tokenizer", "none")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.exit_code == 1 and "cannot be written" in done.output and "File too large" in done.output
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_all_of_an_export_is_on_the_disk_before_the_name_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = checkpoint(tmp_path)
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_rename(source: Any, target: Any) -> None:
        events.append(f"rename to {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    exporting.export_checkpoint(path, tmp_path / "out", max_shard_bytes=40_000, with_tokenizer=False)
    monkeypatch.undo()
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert "model.safetensors.index.json" in files and len(files) > 5
    named = events.index("rename to out")
    assert set(events[: named - 1]) == files and events[named - 1].startswith(".out.partial-")
    assert events[named + 1 :] == [tmp_path.name]


def test_every_mistake_is_told_in_one_line(tmp_path: Path) -> None:
    path, _ = checkpoint(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    torch.save({"state_dict": {}}, tmp_path / "empty")
    other = tmp_path / "other.json"
    other.write_text(json.dumps(tiny_config(FAMILY, vocab_size=64).to_dict()))
    llama = tmp_path / "llama.json"
    llama.write_text(json.dumps(tiny_config("llama").to_dict()))
    for arguments, code, complaint in (
        ([path, tmp_path / "taken"], 2, "exists already"),
        ([tmp_path / "absent", tmp_path / "out"], 2, "does not exist"),
        ([path, tmp_path / "out", "--dtype", "int4"], 2, "--dtype int4"),
        ([path, tmp_path / "out", "--max-shard-size", "5 hours"], 2, "--max-shard-size"),
        ([path, tmp_path / "out", "--tokenizer", tmp_path / "taken"], 2, "holds no tokenizer files"),
        ([tmp_path / "empty", tmp_path / "out"], 2, "does not say what its model's config is"),
        ([path, tmp_path / "out", "--config", other], 1, "has shape (128, 48) instead of (64, 48)"),
        ([path, tmp_path / "out", "--config", llama], 1, "is missing"),
        ([path, tmp_path / "out", "--config", "nothing"], 2, "--config nothing"),
    ):
        done = command(*arguments)
        assert done.exit_code == code and complaint in done.output, (arguments, done.output)
        assert len(done.output.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
    shard = next(path.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    done = command(path, tmp_path / "out")
    assert done.exit_code == 1 and shard.name in done.output


def test_tokenizer_files_go_along(tmp_path: Path) -> None:
    path, _ = checkpoint(tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "tokenization_own.py",
        "weights.bin",
    ):
        (source / name).write_text(f'"{name}"')
    (source / "config.json").write_text('{"model_type": "qwen3_moe"}')
    (source / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    done = command(path, tmp_path / "out", "--tokenizer", source)
    assert done.exit_code == 0 and "does not load, so its copy was not compared" in done.output
    found = {file.name for file in (tmp_path / "out").iterdir()}
    taken = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert found == taken | {"config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["temperature"] == 0.6


def words(**ids: int) -> Any:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, **ids}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_the_tokenizer_is_compared_with_its_source(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = checkpoint(tmp_path)
    source = tmp_path / "source"
    PreTrainedTokenizerFast(tokenizer_object=words(Hello=1, world=2), unk_token="[UNK]").save_pretrained(source)
    given = source if kind == "folder" else (source / "tokenizer.json").rename(tmp_path / "own.json")
    done = command(path, tmp_path / "good", "--tokenizer", given)
    assert done.exit_code == 0 and "Its tokenizer loads and encodes a text into the same" in done.output
    copy = hf_folder.shutil.copyfile

    def otherwise(old: Path, new: Path) -> None:
        copy(old, new)
        if new.name == "tokenizer.json":
            words(Hello=2, world=1).save(str(new))

    monkeypatch.setattr(hf_folder.shutil, "copyfile", otherwise)
    done = command(path, tmp_path / "other", "--tokenizer", given)
    assert done.exit_code == 1 and f"encodes a text otherwise than {given}, from token 0 on" in done.output
    monkeypatch.setattr(hf_folder.shutil, "copyfile", lambda old, new: new.write_text("{"))
    done = command(path, tmp_path / "torn", "--tokenizer", given)
    assert done.exit_code == 1 and "does not load, though its source does" in done.output
    assert not (tmp_path / "other").exists() and not (tmp_path / "torn").exists()


def test_a_tokenizer_that_transformers_5_wrote_is_in_words_that_4_57_knows(tmp_path: Path) -> None:
    path, _ = checkpoint(tmp_path)
    made = PreTrainedTokenizerFast(
        tokenizer_object=words(Hello=1, world=2), unk_token="[UNK]", extra_special_tokens=["[A]"]
    )
    made.save_pretrained(tmp_path / "source")
    assert command(path, tmp_path / "out", "--tokenizer", tmp_path / "source").exit_code == 0
    values = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in values
    read = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read.extra_special_tokens == values["additional_special_tokens"] == ["[A]"]
    # One of somebody else's is copied as it is.
    (tmp_path / "source/tokenizer_config.json").write_text('{ "tokenizer_class" : "LlamaTokenizer" }')
    assert command(path, tmp_path / "copy", "--tokenizer", tmp_path / "source").exit_code == 0
    assert (tmp_path / "copy/tokenizer_config.json").read_text() == '{ "tokenizer_class" : "LlamaTokenizer" }'


def test_sizes_in_words() -> None:
    assert [bytes_of(text, "x") for text in ("5GB", "1.5 MiB", "70", "2kb")] == [5 * 10**9, 1572864, 70, 2000]
    with pytest.raises(ConfigError, match="x 0GB is no size"):
        bytes_of("0GB", "x")


def on_meta(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {key: tensor.to("meta") for key, tensor in tensors.items()}


def test_a_tensor_that_never_came_or_came_twice_is_told(tmp_path: Path) -> None:
    one = torch.tensor(1.0, dtype=torch.bfloat16)
    shards = Shards(on_meta(a=torch.ones(2, 3), b=one), 10**6)
    with pytest.raises(CheckpointError, match="1 tensors were never written, a first"):
        shards.write(tmp_path, [("b", 0, one), ("a", 1, torch.ones(1, 3))])
    for twice in ([("b", 0, one)] * 2, [("a", 0, torch.ones(2, 3)), ("a", 1, torch.ones(1, 3))], [("c", 0, one)]):
        with pytest.raises(CheckpointError, match=r"[abc] is not expected"):
            shards.write(tmp_path, twice)
    assert not list(tmp_path.iterdir())


def test_one_file_at_a_time_is_in_memory_and_the_one_before_is_on_the_disk(tmp_path: Path) -> None:
    """So an export takes the memory of its largest file, whatever the size of the model."""
    whole = {f"t{number}": torch.full((4, 5), float(number)) for number in range(6)}
    shards = Shards(on_meta(**whole), 2 * 4 * 5 * 4)
    assert [len(keys) for keys in shards.files.values()] == [2, 2, 2]

    def rows() -> Any:
        for number, (key, tensor) in enumerate(whole.items()):
            for first in range(4):
                assert len(list(tmp_path.glob("*.safetensors"))) == number // 2
                yield key, first, tensor[first : first + 1]

    shards.write(tmp_path, rows())
    for file, keys in shards.files.items():
        found = load_file(tmp_path / file)
        assert list(found) == keys and all(torch.equal(found[key], whole[key]) for key in keys)


def test_any_part_of_any_stored_tensor_is_read(tmp_path: Path) -> None:
    """Slices of columns, a tensor stored transposed, a scalar and one without values."""
    whole = {
        "plain": torch.arange(60.0).reshape(5, 4, 3).bfloat16(),
        "transposed": torch.arange(12).reshape(3, 4).t(),
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
    }
    training_state.save_sharded({"state_dict": dict(whole)}, tmp_path / "c.ckpt", is_main=True)
    source = FolderSource(tmp_path / "c.ckpt")
    for name, bounds in (
        ("plain", ((1, 4), (2, 3), (0, 2))),
        ("transposed", ((1, 4), (0, 2))),
        ("scalar", ()),
        ("empty", ((0, 0), (0, 3))),
    ):
        assert torch.equal(source.read(name, bounds), whole[name][tuple(slice(*pair) for pair in bounds)])
    source._tensors["plain"][1].chunks.clear()
    with pytest.raises(CheckpointError, match="cover 0 of 60 values of plain"):
        source.read("plain", ((0, 5), (0, 4), (0, 3)))
