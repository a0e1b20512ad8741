"""Weights out of real runs, of every family, from several layouts, and once more through transformers.

Catches an expert or a part that comes out as another, a shard that is put at another's place, a dtype that changes on
the way, a folder that transformers loads only in part, and an exported model that says something else than the trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file
from test_strategy import trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.callbacks import ExportAtEnd
from lightning_npu_tp.checkpoint.export import export_checkpoint
from lightning_npu_tp.errors import CheckpointError, ConfigError
from lightning_npu_tp.families.registry import FAMILIES
from lightning_npu_tp.testing.models import reference_model, tiny_config
from lightning_npu_tp.testing.reference import float64_reference, relative_difference

LAYOUTS = {"one rank": (1, 1, 1), "tensor 2": (1, 2, 2), "data 2 tensor 2 expert 4": (2, 2, 4)}
DTYPES = (torch.bfloat16, torch.float32)
# Two of them tie their embeddings, so that tied weights go through every step as well.
CONFIGS = {family.name: {"tie_word_embeddings": family.name in ("qwen2", "llama")} for family in FAMILIES}


class Module(LightningModule):
    """Any user's module: a model from a folder, and a head of one's own that is no part of it."""

    def __init__(self, source: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.source, self.dtype_ = source, dtype
        self.own = torch.nn.Linear(2, 2)

    def configure_model(self) -> None:
        if not hasattr(self, "network"):
            self.network = AutoModelForCausalLM.from_pretrained(self.source, dtype=self.dtype_)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.network(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def data() -> DataLoader:
    return DataLoader(torch.randint(0, 128, (8, 12), generator=torch.Generator().manual_seed(7)), batch_size=2)


def run_of(layout: tuple[int, int, int], **arguments: Any) -> Any:
    names = ("data_parallel_size", "tensor_parallel_size", "expert_parallel_size")
    strategy = NPUTensorParallelStrategy(
        init_seed=0,
        save_distributed_checkpoint=arguments.pop("sharded", True),
        **dict(zip(names, layout, strict=True)),
    )
    return trainer(strategy, devices=layout[0] * layout[1], use_distributed_sampler=True, **arguments)


def dtypes_of(family: str, layout: tuple[int, int, int]) -> tuple[torch.dtype, ...]:
    """On one rank both; on more, to save time, one in two and the other in four."""
    number = [known.name for known in FAMILIES].index(family)
    return DTYPES if layout == (1, 1, 1) else (DTYPES[(number + layout[0]) % 2],)


def zero_steps(rank: int, world_size: int, folder: str, families: list[str], layout: tuple[int, int, int]) -> None:
    for family in families:
        for dtype in dtypes_of(family, layout):
            name = f"{folder}/{family}-{dtype}"
            run = run_of(layout, max_steps=0, precision="bf16-true" if dtype == torch.bfloat16 else "32-true")
            run.fit(Module(name, dtype), data())
            run.save_checkpoint(f"{name}.ckpt")


def folders(root: Path, families: list[str]) -> None:
    for family in families:
        model = reference_model(tiny_config(family, **CONFIGS[family]))
        for dtype in DTYPES:
            model.to(dtype)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    # As published, and as transformers loads it, whatever the weights are.
                    buffer.data = torch.linspace(-0.2, 0.2, len(buffer))
            model.save_pretrained(root / f"{family}-{dtype}")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_round_trip_is_bit_identical(on_ranks: Any, tmp_path: Path, layout: tuple[int, int, int]) -> None:
    families = [family.name for family in FAMILIES]
    folders(tmp_path, families)
    on_ranks(zero_steps, layout[0] * layout[1], str(tmp_path), families, layout, backend=None, timeout=150)
    for family in families:
        for dtype in dtypes_of(family, layout):
            name = tmp_path / f"{family}-{dtype}"
            out = tmp_path / f"{name.name}.out"
            done = export_checkpoint(tmp_path / f"{name.name}.ckpt", out)
            before, after = load_file(name / "model.safetensors"), load_file(out / "model.safetensors")
            assert before.keys() == after.keys(), family
            for key, wanted in before.items():
                assert after[key].dtype == wanted.dtype, (family, key)
                assert torch.equal(after[key], wanted), (family, key)
            assert done.differences == [] and done.compared == done.tensors == len(before)
            for file in ("config.json", "generation_config.json"):
                told, meant = (json.loads((place / file).read_text()) for place in (out, name))
                assert told == meant, (family, file)
            assert any("own.weight" in note for note in done.notes)


class Trained(Module):
    """Says, when it is trained, what the sharded model itself computes."""

    said: dict[str, torch.Tensor]

    def on_train_end(self) -> None:
        self.eval()
        with torch.no_grad():
            logits = self.network(input_ids=prompt(), gather_logits=True).logits
            tokens = self.network.generate(prompt(), max_new_tokens=8, do_sample=False, eos_token_id=None)
        self.train()
        self.said = {"logits": logits, "tokens": tokens}


def prompt() -> torch.Tensor:
    return torch.randint(0, 128, (2, 6), generator=torch.Generator().manual_seed(3))


def two_steps(rank: int, world_size: int, folder: str, family: str, layout: tuple[int, int, int]) -> dict[str, Any]:
    module = Trained(f"{folder}/start", torch.float64)
    export = ExportAtEnd(f"{folder}/live", max_shard_bytes=200_000)
    with float64_reference():
        run = run_of(layout, max_steps=2, precision="64-true", callbacks=[export])
        run.fit(module, data())
        run.save_checkpoint(f"{folder}/end.ckpt")
        run = run_of(layout, max_steps=2, precision="64-true", sharded=False)
        run.fit(Module(f"{folder}/start", torch.float64), data())
        run.save_checkpoint(f"{folder}/file.ckpt")
    return {**module.said, "result": export.result}


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("family", "layout"), [("deepseek_v3", (2, 2, 4)), ("mixtral", (1, 2, 2)), ("llama", (2, 1, 1))], ids=str
)
def test_a_trained_model_says_the_same_in_transformers(
    on_ranks: Any, tmp_path: Path, family: str, layout: tuple[int, int, int]
) -> None:
    reference_model(tiny_config(family, **CONFIGS[family])).save_pretrained(tmp_path / "start")
    first, *others = on_ranks(
        two_steps, layout[0] * layout[1], str(tmp_path), family, layout, backend=None, timeout=120
    )
    result = first["result"]
    assert result.differences == [] and result.compared == result.tensors and result.reloaded
    assert len(result.files) > 1 and all(other["result"] is None for other in others)
    for kind in ("end", "file"):
        assert export_checkpoint(tmp_path / f"{kind}.ckpt", tmp_path / kind).differences == []
    live, stored, from_file = (weights_in(tmp_path / name) for name in ("live", "end", "file"))
    start = weights_in(tmp_path / "start")
    assert live.keys() == stored.keys() == from_file.keys() == start.keys()
    assert all(torch.equal(live[key], stored[key]) and torch.equal(live[key], from_file[key]) for key in live)
    assert not any(torch.equal(live[key], start[key]) for key in live if key.endswith("q_proj.weight"))
    with float64_reference():
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "live", dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        with torch.no_grad():
            logits = model(input_ids=prompt()).logits
            tokens = model.generate(prompt(), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert relative_difference(first["logits"], logits) < 1e-10
    assert torch.equal(first["tokens"], tokens)


def refused(rank: int, world_size: int, folder: str) -> str:
    (Path(folder) / "taken").mkdir(exist_ok=True)
    (Path(folder) / "taken" / "file").touch()
    export = ExportAtEnd(f"{folder}/taken")
    module = Module(f"{folder}/start", torch.float32)
    with pytest.raises(ConfigError, match="taken exists already"):
        run_of((1, 2, 2), max_steps=1, callbacks=[export]).fit(module, data())
    none = ExportAtEnd(f"{folder}/no steps")
    run_of((1, 2, 2), max_steps=0, callbacks=[none]).fit(Module(f"{folder}/start", torch.float32), data())
    late = ExportAtEnd(f"{folder}/late")
    run = run_of((1, 2, 2), max_steps=1, callbacks=[late])
    module = Module(f"{folder}/start", torch.float32)
    # Someone else takes the name while the run trains.
    module.on_train_start = lambda: (Path(folder) / "late" / "file").mkdir(parents=True, exist_ok=True)
    try:
        run.fit(module, data())
    except CheckpointError as error:
        assert run.global_step == 1
        return str(error)
    return "nothing"


def test_an_export_that_fails_is_told_on_every_rank_after_training(on_ranks: Any, tmp_path: Path) -> None:
    reference_model(tiny_config("llama")).to(torch.float32).save_pretrained(tmp_path / "start")
    for told in on_ranks(refused, 2, str(tmp_path), backend=None):
        assert "The training is done, but its export failed" in told and "late exists already" in told
    assert not list(tmp_path.glob(".*"))
    start, exported = weights_in(tmp_path / "start"), weights_in(tmp_path / "no steps")
    assert exported.keys() == start.keys() and all(torch.equal(exported[key], start[key]) for key in start)
