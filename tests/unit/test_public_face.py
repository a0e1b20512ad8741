"""What `import lightning_npu_tp` costs and gives, and who uses more than its public surface.

Catches a heavy import that comes back, a Trainer that does not know "npu_tp" in one order of imports, a public name
that lies nowhere, and an example, config or error text that leads users below the surface.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

import lightning_npu_tp

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "lightning", "transformers", "numpy", "torch_npu")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import lightning_npu_tp",
        "import lightning_npu_tp.errors",
        "import lightning_npu_tp.models",
        "from lightning_npu_tp.tools.cli import app; app(['--help'], standalone_mode=False)",
        "from lightning_npu_tp.tools.cli import app; app(['check', '--help'], standalone_mode=False)",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str) -> None:
    assert python(f"{code}\nimport sys; print([name for name in {HEAVY} if name in sys.modules])").endswith("[]")


def test_a_misspelt_option_is_told_before_anything_heavy_is_imported() -> None:
    told = python(
        "import sys, typer\n"
        "from lightning_npu_tp.tools.cli import app\n"
        "sys.argv = ['lightning-npu-tp', 'prove', '--modle', 'x']\n"
        "try: app()\n"
        f"except SystemExit as end: print(end.code, [name for name in {HEAVY} if name in sys.modules])"
    )
    assert told.endswith("2 []")


@pytest.mark.parametrize(
    "imports",
    [
        "import lightning_npu_tp\nfrom lightning import Trainer",
        "import lightning_npu_tp, importlib, lightning_npu_tp.trainer.registration as registration\n"
        "importlib.reload(registration); importlib.reload(lightning_npu_tp)\nfrom lightning import Trainer",
        "from lightning.pytorch import Trainer\nimport lightning_npu_tp",
        # Modules whose own import brings Lightning in, and which are then half imported when it comes to registering.
        "import lightning_npu_tp.trainer.accelerator\nfrom lightning.pytorch import Trainer",
        "import lightning_npu_tp.trainer.loops\nfrom lightning.pytorch import Trainer",
    ],
)
def test_lightning_knows_our_names_in_every_order_of_imports(imports: str) -> None:
    told = python(
        f"import warnings; warnings.simplefilter('ignore')\n{imports}\n"
        "import sys, lightning_npu_tp, lightning.pytorch as lightning\n"
        "from lightning.pytorch.accelerators import AcceleratorRegistry\n"
        "trainer = Trainer(accelerator='cpu', devices=1, strategy='npu_tp', logger=False, enable_checkpointing=False)\n"
        "assert type(trainer.strategy) is lightning_npu_tp.NPUTensorParallelStrategy\n"
        "assert AcceleratorRegistry['npu']['accelerator'] is lightning_npu_tp.NPUAccelerator\n"
        "assert not [finder for finder in sys.meta_path if 'npu_tp' in type(finder).__module__]\n"
        # A rank that waits for its model needs none of transformers' models.
        "assert 'transformers.modeling_utils' not in sys.modules\n"
        "print(lightning.__loader__ is lightning.__spec__.loader, type(lightning.__loader__).__name__)"
    )
    assert told.endswith("True SourceFileLoader")


@pytest.mark.parametrize("package", ["lightning_npu_tp", "lightning_npu_tp.models", "lightning_npu_tp.callbacks"])
def test_every_public_name_is_there(package: str) -> None:
    module = import_module(package)
    for name in module.__all__:
        assert getattr(module, name).__name__.rpartition(".")[2] == name or name in ("KeyTable", "Plan")
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


def below_the_surface(text: str) -> list[str]:
    """Names that the text takes from inside the package and that are not public."""
    imported = re.findall(r"from lightning_npu_tp\.?(\S*) import (?:\(([^)]*)\)|(.*))", text)
    named = [f"{room}.{name}".strip(".") for room, *names in imported for name in re.findall(r"\w+", " ".join(names))]
    named += re.findall(r"(?<!from )\blightning_npu_tp\.(\w+(?:\.\w+)*)", text)
    return sorted({name for name in named if not is_public(name)})


def is_public(name: str) -> bool:
    room, _, inside = name.partition(".")
    if room not in lightning_npu_tp.__all__:
        return False
    return not inside or inside in getattr(import_module(f"lightning_npu_tp.{room}"), "__all__", ())


def test_what_lies_below_the_surface_is_seen() -> None:
    text = (
        "from lightning_npu_tp.models.layers.linear import ShardedMLP\n"
        "_target_: lightning_npu_tp.launch.sweep.run_job\n"
        "from lightning_npu_tp import ModelFamily, nothing\n"
        "from lightning_npu_tp.models import (\n    Rows,\n    gqa,\n)\n"
        "lightning_npu_tp.callbacks.Warmup, lightning_npu_tp.HcclSettings"
    )
    below = ["launch.sweep.run_job", "models.gqa", "models.layers.linear.ShardedMLP", "nothing"]
    assert below_the_surface(text) == below


def test_what_users_read_and_copy_stays_on_the_surface() -> None:
    files = [ROOT / "train.py", ROOT / "show_data.py"]
    for folder in ("conf", "examples", "lit_models"):
        files += [file for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".yaml")]
    assert len(files) > 50
    found = {str(file.relative_to(ROOT)): names for file in files if (names := below_the_surface(file.read_text()))}
    # The token cache writes a folder whole or not at all as checkpoints are written, and not by code of its own; the
    # run folder is locked as they are.
    shared = ("checkpoint.files.", "checkpoint.locks.", "checkpoint.regular_files.")
    for file in ("lit_models/data/cache.py", "lit_models/run/run_folder.py"):
        assert all(name.startswith(shared) for name in found.pop(file))
    # Which check `load_tokenizer` and the command `check` share.
    assert found.pop("lit_models/data/tokenizers.py") == ["weights.tokenizer_check.difference_from_file"]
    # What a folder of another kind, or a config that no embedding has room for, is called by the commands too.
    shared_words = ["models.token_ids.require_padding_in_vocabulary", "weights.safetensors_reader.told_of_adapter"]
    assert found.pop("lit_models/causal_lm.py") == shared_words
    assert not found


def test_texts_that_users_see_name_nothing_below_the_surface() -> None:
    found = {}
    for file in (ROOT / "lightning_npu_tp").rglob("*.py"):
        tree = ast.parse(file.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        # Sentences: a name alone is what a module imports by name, and no text.
        texts = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
            if id(node) not in docstrings and "python -m" not in node.value
        ]
        if names := below_the_surface("\n".join(texts)):
            found[str(file.relative_to(ROOT))] = names
    assert not found


def test_no_two_modules_have_one_basename() -> None:
    modules = [*(ROOT / "lightning_npu_tp").rglob("*.py"), *(ROOT / "lit_models").rglob("*.py")]
    names = Counter(file.name for file in modules if not file.stem.startswith("__"))
    assert not [name for name, number in names.items() if number > 1]
