"""An exported folder says in transformers 4.57 what it says in transformers 5.

Catches a setting that is written under the new name alone: 4.57 would take its class's default without a word. `make
build/transformers-4.57`, which `make test-all` asks for, puts the older one beside the environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from folder_answers import answers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_npu_tp.models.families.registry import FAMILIES
from lightning_npu_tp.tools.testing.models import reference_model, tiny_config, tiny_deepseek_v2_grouped_config
from lightning_npu_tp.tools.testing.reference import relative_difference
from lightning_npu_tp.weights.hf_export import export_checkpoint

ROOT = Path(__file__).parents[2]
OLDER = ROOT / "build/transformers-4.57"
YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Mixtral's default is the 8 of its tiny config; the other classes' are none of their tiny configs'.
EXPERTS = {"mixtral": {"num_local_experts": 6}}
DENSE = ("llama", "qwen2", "qwen3")
# A class of tokenizers is registered for the first family, none for the other.
WITH_TOKENIZER = ("qwen3_moe-published", "deepseek_v3-base")


def configs() -> dict[str, Any]:
    """Every family as it is in small; with another base of the rotation, tied where dense; with YaRN."""
    found: dict[str, Any] = {"deepseek_v2-grouped": tiny_deepseek_v2_grouped_config()}
    found["llama-scaled"] = tiny_config("llama", rope_parameters=dict(LLAMA3), attention_bias=True, mlp_bias=True)
    found["qwen3_moe-trained"] = tiny_config("qwen3_moe", output_router_logits=True, use_cache=False)
    for name in [family.name for family in FAMILIES]:
        other = {"rope_parameters": {"rope_type": "default", "rope_theta": 2e5}, "tie_word_embeddings": name in DENSE}
        found[f"{name}-published"] = tiny_config(name, **EXPERTS.get(name, {}))
        found[f"{name}-base"] = tiny_config(name, **other)
        found[f"{name}-yarn"] = tiny_config(name, rope_parameters=dict(YARN))
    return found


def make_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 128 tokens with two special ones and a chat template, as transformers 5 saves it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:90]
    trainer = trainers.BpeTrainer(vocab_size=126, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["river mill flour rivers"], trainer)
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", extra_special_tokens=["<mill>"])
    own.chat_template = "{% for message in messages %}{{ message.content }}<end>{% endfor %}"
    own.save_pretrained(folder)


def export(config: Any, place: Path, out: Path) -> None:
    """Export a model of this config with random float64 weights, from a checkpoint as LitCausalLM leaves it."""
    model = reference_model(config)
    content = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "hyper_parameters": {"architecture": config.model_type, "config": config.to_diff_dict()},
    }
    torch.save(content, place)
    with_tokenizer = out.name in WITH_TOKENIZER
    tokenizer = place.with_name("tokenizer") if with_tokenizer else None
    done = export_checkpoint(place, out, tokenizer=tokenizer, with_tokenizer=with_tokenizer, verify=with_tokenizer)
    assert not done.differences, done.differences
    told = any("leaves mscale_all_dim=0.707 out" in note for note in done.notes)
    assert told == (out.name in ("deepseek_v2-published", "deepseek_v2-grouped")), out.name


def test_transformers_4_57_says_of_an_export_what_transformers_5_says(tmp_path: Path) -> None:
    assert OLDER.is_dir(), "transformers 4.57 is not here: make build/transformers-4.57"
    make_tokenizer(tmp_path / "tokenizer")
    for name, config in configs().items():
        export(config, tmp_path / "checkpoint", tmp_path / "folders" / name)
    script = [sys.executable, str(Path(__file__).with_name("folder_answers.py"))]
    subprocess.run(
        [*script, str(tmp_path / "folders"), str(tmp_path / "answers")],
        env=os.environ | {"PYTHONPATH": f"{OLDER}:{ROOT}", "TRANSFORMERS_VERBOSITY": "error"},
        check=True,
        timeout=300,
    )
    old, new = torch.load(tmp_path / "answers"), answers(tmp_path / "folders")
    assert old.keys() == new.keys() and len(new) == 3 * len(FAMILIES) + 4
    for name, wanted in new.items():
        found = old[name]
        assert found["version"].startswith("4.57.") and wanted["version"].startswith("5.")
        assert found["cached"] == wanted["cached"] == (True, True), name
        difference = relative_difference(found["logits"], wanted["logits"])
        if name.endswith("as it is"):
            assert difference > 0.01, "transformers 4.57 has the factor now: nothing needs to be told any more"
            continue
        assert difference < 1e-10, (name, difference)
        assert torch.equal(found["tokens"], wanted["tokens"]), name
        assert found.get("text") == wanted.get("text") and ("text" in wanted) == (name in WITH_TOKENIZER), name
