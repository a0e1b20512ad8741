"""Weights in by the streaming loader and out of real runs: every family, several layouts, and through transformers.

Catches an expert or a part that comes out as another, a shard that is put at another's place, a dtype that changes on
the way, a folder that transformers loads only in part, and an exported model that says something else than the trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from test_strategy import trainer
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from lightning_npu_tp import NPUTensorParallelStrategy, weights_from
from lightning_npu_tp.callbacks import ExportAtEnd
from lightning_npu_tp.convert.convert import conversion_of
from lightning_npu_tp.errors import CheckpointError, ConfigError
from lightning_npu_tp.models.families.registry import FAMILIES
from lightning_npu_tp.tools.testing.models import reference_model, tiny_config
from lightning_npu_tp.tools.testing.reference import float64_reference, relative_difference
from lightning_npu_tp.weights.hf_export import export_checkpoint

LAYOUTS = {
    "one rank": (1, 1, 1),
    "tensor 2": (1, 2, 2),
    "data 2 expert 2": (2, 1, 2),
    "data 2 tensor 2 expert 4": (2, 2, 4),
}
DTYPES = (torch.bfloat16, torch.float32)
# Two of them tie their embeddings, so that tied weights go through every step as well.
CONFIGS = {family.name: {"tie_word_embeddings": family.name in ("qwen2", "llama")} for family in FAMILIES}
# Folders of the round trip, by family, tied embeddings, and whose names the experts have: those that are published, or
# the stacked ones of transformers' classes. Families without experts have one kind of names only.
DENSE = ("llama", "qwen2", "qwen3")
CASES = {
    f"{family.name}_{kind}": (family.name, tied, fused)
    for family in FAMILIES
    for kind, tied, fused in (("untied", False, False), ("tied", True, False), ("fused", False, True))
    if (kind == "untied" or (family.name in DENSE) == (kind == "tied"))
}


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
    strategy = NPUTensorParallelStrategy(init_seed=0, **dict(zip(names, layout, strict=True)))
    return trainer(strategy, devices=layout[0] * layout[1], use_distributed_sampler=True, **arguments)


class Streamed(Module):
    """Many models, built without weights and filled by the streaming loader when they are sharded."""

    def __init__(self, root: str, dtype: torch.dtype) -> None:
        super().__init__(root, dtype)
        self.networks = torch.nn.ModuleDict()

    def configure_model(self) -> None:
        for case in CASES if not self.networks else ():
            folder = f"{self.source}/{case}"
            with torch.device("meta"):
                self.networks[case] = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
            weights_from(self.networks[case], folder)


def zero_steps(rank: int, world_size: int, root: str, layout: tuple[int, int, int]) -> list[int]:
    read = []
    for dtype in DTYPES:
        run = run_of(layout, max_steps=0, precision="bf16-true" if dtype == torch.bfloat16 else "32-true")
        module = Streamed(f"{root}/{dtype}", dtype)
        run.fit(module, data())
        # The optimizer's moments of so many models take more time than all the rest.
        run.save_checkpoint(f"{root}/{dtype}.ckpt", weights_only=True)
        for network in module.networks.values():
            report = conversion_of(network)
            assert report is not None and report.loaded is not None
            read.append(report.loaded.bytes)
    return read


def write_folders(root: Path) -> None:
    """Every case in every dtype; beside a folder of fused names, `published`, what shall come out of it."""
    for case, (family, tied, fused) in CASES.items():
        model = reference_model(tiny_config(family, tie_word_embeddings=tied))
        for dtype in DTYPES:
            model.to(dtype)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    # As published, and as transformers loads it, whatever the weights are.
                    buffer.data = torch.linspace(-0.2, 0.2, len(buffer))
            folder = root / str(dtype) / case
            model.save_pretrained(folder)
            if fused:
                published = load_file(folder / "model.safetensors")
                state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
                assert len(state) < len(published) and any(name.endswith("experts.gate_up_proj") for name in state)
                (folder / "model.safetensors").rename(folder / "published")
                save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    write_folders(root)
    return root


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_round_trip_is_bit_identical(
    on_ranks: Any, folders: Path, tmp_path: Path, layout: tuple[int, int, int]
) -> None:
    """Folder -> streaming loader -> shards -> no step -> checkpoint -> export: every name and every bit."""
    ranks = on_ranks(zero_steps, layout[0] * layout[1], str(folders), layout, backend=None, timeout=400)
    assert all(count > 0 for read in ranks for count in read) and len(ranks[0]) == len(CASES) * len(DTYPES)
    for dtype in DTYPES:
        for case, (family, tied, fused) in CASES.items():
            source, out = folders / str(dtype) / case, tmp_path / str(dtype) / case
            # Once more through transformers on one rank; on more, the same files come out.
            done = export_checkpoint(
                folders / f"{dtype}.ckpt", out, model=f"networks.{case}", verify=layout == (1, 1, 1) and not fused
            )
            assert done.differences == [], case
            before = load_file(source / ("published" if fused else "model.safetensors"))
            after = load_file(out / "model.safetensors")
            assert before.keys() == after.keys(), case
            assert ("lm_head.weight" in after) != tied
            for key, wanted in before.items():
                assert after[key].dtype == wanted.dtype, (case, key)
                assert torch.equal(after[key], wanted), (case, key)
            assert done.tensors == len(before)
            assert done.compared == (len(before) if layout == (1, 1, 1) and not fused else None)
            told, meant = (AutoConfig.from_pretrained(place) for place in (out, source))
            # In files of training: no cache.
            meant.use_cache, meant.name_or_path = True, told.name_or_path
            assert told.to_dict() == meant.to_dict(), case
            told, meant = (GenerationConfig.from_pretrained(place) for place in (out, source))
            meant.use_cache = True
            assert told.to_diff_dict() == meant.to_diff_dict(), case
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
    assert export_checkpoint(tmp_path / "end.ckpt", tmp_path / "end").differences == []
    live, stored = (weights_in(tmp_path / name) for name in ("live", "end"))
    start = weights_in(tmp_path / "start")
    assert live.keys() == stored.keys() == start.keys()
    assert all(torch.equal(live[key], stored[key]) for key in live)
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


class AllFamilies(Module):
    """A model of every family, trained together."""

    def configure_model(self) -> None:
        if not hasattr(self, "networks"):
            self.networks = torch.nn.ModuleDict()
            for family in FAMILIES:
                with torch.device("meta"):
                    config = AutoConfig.from_pretrained(f"{self.source}/{family.name}")
                    self.networks[family.name] = AutoModelForCausalLM.from_config(config)
                weights_from(self.networks[family.name], f"{self.source}/{family.name}")

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return torch.stack([network(input_ids=batch, labels=batch).loss for network in self.networks.values()]).sum()

    def on_train_end(self) -> None:
        self.said = {}
        self.eval()
        with torch.no_grad():
            for name, network in self.networks.items():
                self.said[name] = network.generate(prompt(), max_new_tokens=8, do_sample=False, eos_token_id=None)
        self.train()


def train_all(rank: int, world_size: int, root: str, layout: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    module = AllFamilies(root, torch.float64)
    with float64_reference():
        run = run_of(layout, max_steps=3, precision="64-true")
        run.fit(module, data())
        run.save_checkpoint(f"{root}/end.ckpt", weights_only=True)
    return module.said


def generated(folder: Path) -> torch.Tensor:
    with float64_reference():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        return model.generate(prompt(), max_new_tokens=8, do_sample=False, eos_token_id=None)


def test_every_family_generates_in_transformers_what_the_trained_shards_generated(
    on_ranks: Any, tmp_path: Path
) -> None:
    for family in FAMILIES:
        model = reference_model(tiny_config(family.name, **CONFIGS[family.name]))
        model.save_pretrained(tmp_path / family.name)
    results = on_ranks(train_all, 4, str(tmp_path), (2, 2, 4), backend=None, timeout=400)
    changed = 0
    for family in FAMILIES:
        out = tmp_path / f"{family.name}.out"
        export_checkpoint(tmp_path / "end.ckpt", out, model=f"networks.{family.name}", verify=False)
        tokens = generated(out)
        assert all(torch.equal(said[family.name], tokens) for said in results), family.name
        changed += not torch.equal(generated(tmp_path / family.name), tokens)
    # Three steps of AdamW have taught most of them something else to say than they began with.
    assert changed >= len(FAMILIES) // 2


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
