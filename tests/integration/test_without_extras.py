"""The package without its extras. Catches an import of torch_npu, Hydra or TensorBoard that nobody asked for.

The packages are made unimportable in a fresh process, as they are where they are not installed.
"""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
for name in ("torch_npu", "hydra", "tensorboard", "pyarrow"):
    sys.modules[name] = None
import warnings
warnings.simplefilter("ignore")
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import lightning_npu_tp.callbacks
from plain_module import LanguageModel
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
trainer = Trainer(
    accelerator="cpu", devices=1, strategy="npu_tp", max_steps=2, logger=False, enable_checkpointing=False
)
trainer.fit(LanguageModel(), DataLoader(torch.randint(0, 256, (4, 16)), batch_size=2))
assert trainer.global_step == 2
print("trained")
"""


def test_the_package_imports_and_trains_without_its_extras() -> None:
    from test_examples import EXAMPLES

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(EXAMPLES)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("trained")
