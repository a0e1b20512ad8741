"""The examples as a user runs them: as scripts, on two ranks. Catches one that no longer works or no longer learns."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: str) -> float:
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    finals = re.findall(r"final loss ([\d.]+)", done.stdout)
    assert len(finals) == 2 and finals[0] == finals[1], "both ranks end with the same loss"
    return float(finals[0])


@pytest.mark.parametrize("source", ["meta", "random", "pretrained"])
def test_a_module_that_knows_nothing_of_us_trains(source: str, tmp_path: Path) -> None:
    if source == "pretrained":
        sys.path.insert(0, str(EXAMPLES))
        try:
            from plain_module import CONFIG
        finally:
            sys.path.remove(str(EXAMPLES))
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIG).save_pretrained(tmp_path)
        source = str(tmp_path)
    # Sixteen random sentences over 256 symbols: ln 256 is 5.55 before anything is learnt.
    assert run("plain_module.py", source) < 5.0


def test_a_model_of_ones_own_trains_with_a_family_and_with_a_function() -> None:
    by_family, by_function = run("own_model.py", "family"), run("own_model.py", "convert")
    # The same weights (both keep the module's own) and the same arithmetic, sharded in two ways.
    assert by_family == pytest.approx(by_function, abs=2e-3)
    assert by_family < 0.5
