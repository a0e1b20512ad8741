"""Commands of README.md and docs/ run word for word. Catches one that is shown and does not work.

Names in capitals stand for files that are made here; train.py gets fewer steps, a smaller batch and a run folder of its
own, and is otherwise given what the page says.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from documented import ROOT, RUN_AS_WRITTEN, words
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lightning_npu_tp.checkpoint import training_state
from lightning_npu_tp.tools.testing.models import tiny_config

PROGRAMS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    "lightning-npu-tp": [sys.executable, "-m", "lightning_npu_tp"],
}
FEW = (
    "trainer.max_steps=2 trainer.val_check_interval=2 trainer.limit_val_batches=1 scheduler.warmup_steps=1 "
    "data.batch_size=2 data.sequence_length=32"
).split()
TURN = "<|{{ message.role }}|> {{ message.content }} <end> "
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|assistant|> {% generation %}"
    "{{ message.content }} <end> {% endgeneration %}{% else %}" + TURN + "{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the names in the pages' commands stand for."""
    place = tmp_path_factory.mktemp("files")
    config = tiny_config("deepseek_v2")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(place / "model")
    spoken = "<unk> <end> <|user|> <|assistant|> <|system|> what is one two three four".split()
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(spoken)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(place / "model")
    (place / "texts").mkdir()
    for number in range(4):
        (place / "texts" / f"{number}.txt").write_text("one two three four " * 100)
    turns = [{"role": "user", "content": "what is one"}, {"role": "assistant", "content": "one is two"}]
    (place / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 60)
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    content = {"state_dict": weights, "epoch": 0, "global_step": 3}
    training_state.save_sharded(content, place / "c.ckpt", is_main=True)
    return {
        "PATH": str(place / "model"),
        "FOLDER": str(place / "model"),
        "my/texts": str(place / "texts"),
        "texts": str(place / "texts"),
        "chats.jsonl": str(place / "chats.jsonl"),
        "CKPT": str(place / "c.ckpt"),
    }


def with_files(word: str, files: dict[str, str]) -> str:
    """`data.paths=[texts]` -> `data.paths=[FOLDER/texts]`; a name must be a whole value, or that of `path:`."""
    word = re.sub(r"(?<=\bpath: )[\w/]+", lambda found: files[found[0]], word)
    key, equals, value = word.rpartition("=")
    inner = value.strip("[]")
    return f"{key}{equals}{value.replace(inner, files[inner])}" if inner in files else word


def run(command: str, files: dict[str, str], place: Path) -> subprocess.CompletedProcess[str]:
    first, *rest = (with_files(word, files) for word in words(command))
    given = [*PROGRAMS[first], *rest]
    if "train.py" in given and "--help" not in given:
        given += [*FEW, f"hydra.run.dir={place / 'run'}"]
        if "data=chat" not in given:
            given += ["data.max_tokens=20_000", "data.max_val_tokens=400"]
    # Where CI is set transformers hands its warnings to the root logger, which Hydra prints.
    kept: dict[str, Any] = {name: value for name, value in os.environ.items() if name != "CI"}
    environment = {**kept, "XDG_CACHE_HOME": str(place / "cache")}
    return subprocess.run(given, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("command", RUN_AS_WRITTEN)
def test_a_documented_command_runs(command: str, files: dict[str, str], tmp_path: Path) -> None:
    done = run(command, files, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    if "train.py" in command and "--help" not in command:
        assert (tmp_path / "run/checkpoints/last.ckpt/manifest.json").is_file() and "run folder:" in done.stdout
        assert (tmp_path / "run/loss.png").is_file()
    if "export=true" in command:
        assert (tmp_path / "run/export/model.safetensors").is_file()
    if "consolidate_checkpoint" in command:
        one = torch.load(f"{files['CKPT']}.consolidated", weights_only=True)
        stored = AutoModelForCausalLM.from_pretrained(files["FOLDER"]).state_dict()
        assert one["state_dict"].keys() == {f"model.{name}" for name in stored}
        assert all(torch.equal(one["state_dict"][f"model.{name}"], value) for name, value in stored.items())
    told = {"show-data": "one is two", "audit": "nothing in a training step would stall", "--help": "deepseek_v2_tiny"}
    assert all(text in done.stdout for name, text in told.items() if name in words(command)), done.stdout[-2000:]
