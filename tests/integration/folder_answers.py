"""What the transformers that is imported makes of exported folders: python folder_answers.py FOLDERS FILE.

Run in a process of its own by test_older_transformers.py, with transformers 4.57 before the environment's; imported for
the environment's own. FOLDERS: a folder of model folders. FILE: gets their answers.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from lightning_npu_tp.tools.testing.reference import float64_reference
from lightning_npu_tp.weights.tokenizer_check import PROBE

PROMPT = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(3))


def answer(folder: Path, *, mend: bool = True) -> dict[str, Any]:
    """Logits, float64 [2, 40, V], greedy tokens, whether generation caches, and a text's ids with a tokenizer.

    mend: give DeepSeek-V2's attention of transformers 4.57 the factor that it leaves out.
    """
    with float64_reference():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager"
        ).eval()
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        scaling = getattr(model.config, "rope_scaling", None) or {}
        if mend and model.config.model_type == "deepseek_v2" and transformers.__version__.startswith("4."):
            factor = 0.1 * scaling.get("mscale_all_dim", 0.0) * math.log(scaling.get("factor", 1.0)) + 1.0
            for layer in model.model.layers:
                layer.self_attn.scaling *= factor**2
        with torch.no_grad():
            logits = model(input_ids=PROMPT).logits
            tokens = model.generate(PROMPT[:, :6], max_new_tokens=6, do_sample=False, eos_token_id=None)
    cached = model.config.use_cache, model.generation_config.use_cache
    said = {"logits": logits, "tokens": tokens, "cached": cached, "version": transformers.__version__}
    if (folder / "tokenizer.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer(text)["input_ids"] for text in (PROBE, "river, rivers: mill <mill>")]
        said["text"] = (ids, tokenizer.decode(ids[1]), tokenizer.all_special_tokens, tokenizer.chat_template)
    return said


def answers(folders: Path) -> dict[str, dict[str, Any]]:
    """By folder; of DeepSeek-V2 with YaRN also as it is, under "name as it is"."""
    found = {}
    for folder in sorted(folders.iterdir()):
        found[folder.name] = answer(folder)
        if folder.name == "deepseek_v2-published":
            found[f"{folder.name} as it is"] = answer(folder, mend=False)
    return found


if __name__ == "__main__":
    torch.save(answers(Path(sys.argv[1])), sys.argv[2])
