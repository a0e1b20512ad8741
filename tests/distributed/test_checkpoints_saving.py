"""Saving under a Trainer on two ranks: in the background, with a rank that fails, and with ModelCheckpoint's options.

Catches a save that shares memory with the weights that training goes on to change, a rank that hangs because another
could not write, a good checkpoint removed for one that never came to be, and a failure that nobody hears of.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from test_checkpoints import Recorder
from test_strategy import WORLD, Module, data, trainer

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.checkpoint import writer
from lightning_npu_tp.checkpoint.manifest import newest_complete, read_manifest, verify
from lightning_npu_tp.errors import CheckpointError


def strategy(**options: Any) -> NPUTensorParallelStrategy:
    return NPUTensorParallelStrategy(init_seed=0, **options)


def names(folder: str | Path) -> list[str]:
    """What lies in a folder, hidden files too."""
    return sorted(entry.name for entry in Path(folder).iterdir())


def checkpoints(folder: str, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, **{"filename": "{step}", "every_n_train_steps": 1, **options})


class SlowDisk(Callback):
    """Holds every save back until two more steps have been trained (or the fit ends)."""

    def __init__(self) -> None:
        self.write_part, self.gate, self.steps_in_flight = writer._write_part, threading.Event(), 0

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        def late(*arguments: Any) -> Any:
            assert self.gate.wait(30), "the save waited for the fit and the fit for the save"
            return self.write_part(*arguments)

        writer._write_part = late

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.strategy._saves._running:
            self.steps_in_flight += 1
        if trainer.global_step == 3:
            self.gate.set()

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        writer._write_part = self.write_part


def background(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    for name, asynchronous in (("now", False), ("later", True)):
        disk = SlowDisk()
        run = trainer(strategy(async_save=asynchronous), callbacks=[disk] if asynchronous else [])

        class Once(Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
                if trainer.global_step == 1:
                    trainer.save_checkpoint(f"{folder}/{name}.ckpt")

        run.callbacks.append(Once())
        run.fit(Recorder(), data())
        last = disk.steps_in_flight
    again = {}
    for name in ("now", "later"):
        module = Recorder()
        trainer(strategy(), max_epochs=1).fit(module, data(), ckpt_path=f"{folder}/{name}.ckpt")
        again[name] = (module.losses, module.weights)
    return {"steps": last, **again}


def test_a_save_in_the_background_holds_the_moment_it_was_asked_for(on_ranks: Any, tmp_path: Path) -> None:
    for result in on_ranks(background, WORLD, str(tmp_path), backend=None):
        assert result["steps"] == 3, "training waited for the disk"
        (losses, weights), (late_losses, late_weights) = result["now"], result["later"]
        assert len(losses) == 3 and late_losses == losses
        assert all(torch.equal(late_weights[name], value) for name, value in weights.items())
    assert verify(tmp_path / "later.ckpt") == []
    assert names(tmp_path) == ["later.ckpt", "now.ckpt"]


class Falling(Module):
    """Logs a number that gets better, then worse: of four steps the third is best, the second next."""

    scores = {1: 4.0, 2: 2.0, 3: 1.0, 4: 3.0}

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("score", self.scores[self.trainer.global_step + 1], on_step=True)
        return loss


def options_of_lightning(rank: int, world_size: int, folder: str, asynchronous: bool) -> dict[str, str]:
    found = {}
    for name, options in {
        "newest": {},
        "top2": {"monitor": "score", "save_top_k": 2, "save_last": True},
        "link": {"save_last": "link"},
        "all": {"save_top_k": -1, "every_n_train_steps": 2},
        "epoch": {"every_n_train_steps": None, "every_n_epochs": 1, "save_on_train_epoch_end": True},
    }.items():
        callback = checkpoints(f"{folder}/{name}", **options)
        run = trainer(strategy(async_save=asynchronous), callbacks=[callback], enable_checkpointing=True)
        run.fit(Falling(), data())
        found[name] = Path(callback.best_model_path).name
    return found


@pytest.mark.parametrize("asynchronous", [False, True], ids=["now", "background"])
def test_the_options_of_model_checkpoint_keep_working(on_ranks: Any, tmp_path: Path, asynchronous: bool) -> None:
    expected = {
        "newest": (["step=4.ckpt"], "step=4.ckpt"),
        "top2": (["last.ckpt", "step=2.ckpt", "step=3.ckpt"], "step=3.ckpt"),
        "link": (["last.ckpt", "step=4.ckpt"], "step=4.ckpt"),
        "all": (["step=2.ckpt", "step=4.ckpt"], "step=4.ckpt"),
        "epoch": (["step=4.ckpt"], "step=4.ckpt"),
    }
    for best in on_ranks(options_of_lightning, WORLD, str(tmp_path), asynchronous, backend=None, timeout=120):
        assert best == {name: found for name, (_, found) in expected.items()}
    # Listed here: rank 0 removes, and the other rank may end before it has.
    assert {name: names(tmp_path / name) for name in expected} == {name: found for name, (found, _) in expected.items()}
    assert all(verify(path) == [] for path in tmp_path.glob("*/*"))
    assert (tmp_path / "link" / "last.ckpt").resolve() == tmp_path / "link" / "step=4.ckpt"
    assert (tmp_path / "link" / "last.ckpt").is_symlink()
    # Lightning renews `last` only when a checkpoint was due, which the fourth step's score was not.
    assert read_manifest(tmp_path / "top2" / "last.ckpt").step in (3, 4)
    assert newest_complete(tmp_path / "all") == tmp_path / "all" / "step=4.ckpt"


def small_files_only(enough: int = 1 << 40) -> None:
    """Have this process's files end at so many bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (enough, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class FullDisk(Callback):
    """On one rank no large file can be written while the second and third checkpoints are saved."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if thread := trainer.strategy._saves._thread:
            # The save of the step before is on the disk of the time before.
            thread.join()
        if trainer.global_rank == self.rank:
            small_files_only(20_000 if trainer.global_step in (1, 2) else 1 << 40)


def disk_full(rank: int, world_size: int, folder: str, asynchronous: bool, setting: str, full_rank: int) -> Any:
    # Python ignores the signal, other tests of the process may not.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    callback = checkpoints(folder)
    run = trainer(
        strategy(async_save=asynchronous, on_save_error=setting),
        callbacks=[FullDisk(full_rank), callback],
        enable_checkpointing=True,
    )
    module, said, error = Module(), [], None
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.fit(module, data())
    except CheckpointError as raised:
        error = str(raised)
    finally:
        small_files_only()
        said = [str(warning.message) for warning in caught]
    return {"error": error, "warnings": said, "steps": len(module.losses)}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["now", "background"])
def test_a_full_disk_stops_the_run_and_leaves_the_last_good_checkpoint(
    on_ranks: Any, tmp_path: Path, asynchronous: bool
) -> None:
    results = on_ranks(disk_full, WORLD, str(tmp_path), asynchronous, "stop", 1, backend=None)
    assert results[0]["error"] == results[1]["error"]
    error = results[0]["error"]
    for part in (
        "step=2.ckpt could not be saved: rank 1: File too large",
        "It needs 1.",
        "MB, and",
        "free",
        "continue",
    ):
        assert part in error
    assert names(tmp_path) == ["step=1.ckpt"]
    assert verify(tmp_path / "step=1.ckpt") == []
    # In the background the failure is met at the next save, one step later.
    assert results[0]["steps"] == (3 if asynchronous else 2)


@pytest.mark.parametrize("full_rank", [0, 1])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["now", "background"])
def test_a_full_disk_can_be_survived_and_the_stand_in_goes_when_a_save_succeeds(
    on_ranks: Any, tmp_path: Path, asynchronous: bool, full_rank: int
) -> None:
    results = on_ranks(disk_full, WORLD, str(tmp_path), asynchronous, "continue", full_rank, backend=None)
    assert [result["error"] for result in results] == [None, None]
    assert [result["steps"] for result in results] == [4, 4]
    said = "\n".join(results[0]["warnings"])
    assert said.count("The run goes on without a checkpoint") == 2
    assert "step=1.ckpt is kept, because" in said
    assert "2 of 4 checkpoints of this run were not saved" in said
    assert names(tmp_path) == ["step=4.ckpt"]
    assert verify(tmp_path / "step=4.ckpt") == []


def unwritable(rank: int, world_size: int, folder: str) -> list[str]:
    run = trainer(strategy())
    run.fit(Module(), data())
    run.save_checkpoint(f"{folder}/good")
    if rank == 0:
        Path(f"{folder}/file").touch()
    errors = []
    free = writer.shutil.disk_usage
    for name in ("file/below", "/proc/nowhere/at.ckpt", "too_small"):
        if name == "too_small":
            writer.shutil.disk_usage = lambda path: free(path)._replace(free=1000)
        try:
            with pytest.raises(CheckpointError) as caught:
                run.save_checkpoint(os.path.join(folder, name))
        finally:
            writer.shutil.disk_usage = free
        errors.append(str(caught.value))
    return errors


def test_a_folder_that_cannot_be_written_is_named_on_every_rank(on_ranks: Any, tmp_path: Path) -> None:
    first, second = on_ranks(unwritable, WORLD, str(tmp_path), backend=None)
    assert first == second
    below, system, small = first
    assert "file/below could not be saved: rank 0: " in below and "It needs" in below
    assert "/proc/nowhere/at.ckpt could not be saved: rank 0: No such file or directory" in system
    assert "too_small could not be saved: it needs 1." in small and "1.0 kB are free" in small
    assert names(tmp_path) == ["file", "good"]


class Tokenizer:
    path = None
    vocab_size = 128

    def __init__(self, name: str) -> None:
        self.name = name

    def fingerprint(self) -> str:
        return f"fingerprint of {self.name}"


def data_module(tokenizer: str) -> Any:
    from lightning.pytorch import LightningDataModule

    module = LightningDataModule()
    module.train_dataloader = data
    module.tokenizer = Tokenizer(tokenizer)
    return module


def other_runs(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    errors = {}
    run = trainer(strategy())
    first = Recorder()
    run.fit(first, datamodule=data_module("words"))
    run.save_checkpoint(f"{folder}/good")
    run.save_checkpoint(f"{folder}/weights", weights_only=True)

    def fit(name: str, module: Any, tokenizer: str, ckpt: str, **options: Any) -> Any:
        again = trainer(strategy(**options), max_epochs=2)
        try:
            again.fit(module, datamodule=data_module(tokenizer), ckpt_path=f"{folder}/{ckpt}")
        except CheckpointError as error:
            errors[name] = str(error)
        return again

    fit("tokenizer", Module(), "letters", "good")
    fit("allowed", allowed := Module(), "letters", "good", allow_other_tokenizer=True)
    fit("weights", Module(), "words", "weights")
    anew = fit("anew", fresh := Module(), "words", "weights", resume_weights_only=True)
    llama = Module()
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    with torch.device("meta"):
        llama.network = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **sizes))
    fit("family", llama, "words", "good")
    return {"errors": errors, "allowed": len(allowed.losses), "fresh": fresh.losses, "steps": anew.global_step}


def test_a_checkpoint_of_another_run_is_refused_by_name(on_ranks: Any, tmp_path: Path) -> None:
    for result in on_ranks(other_runs, WORLD, str(tmp_path), backend=None, timeout=120):
        errors = result["errors"]
        assert sorted(errors) == ["family", "tokenizer", "weights"]
        assert "words (vocabulary 128" in errors["tokenizer"] and "letters (vocabulary 128" in errors["tokenizer"]
        assert "strategy.allow_other_tokenizer=true" in errors["tokenizer"]
        assert "holds no state of optimizer 0" in errors["weights"]
        assert "strategy.resume_weights_only=true" in errors["weights"]
        assert "of a deepseek_v2 (model_type deepseek_v2), and network is a llama" in errors["family"]
        assert result["allowed"] == 4, "the second epoch, after the first from the checkpoint"
        assert len(result["fresh"]) == 8 and result["steps"] == 8, "both epochs anew"
    assert read_manifest(tmp_path / "good").tokenizer["name"] == "words"


def from_before(rank: int, world_size: int, folder: str) -> Any:
    run = trainer(strategy())
    run.fit(Module(), data())
    run.save_checkpoint(f"{folder}/old")
    if rank == 0:
        for name in ("manifest.json", "rank_0.pt", "rank_1.pt"):
            Path(f"{folder}/old/{name}").unlink()
    run.strategy._open()
    run.strategy.barrier()
    run.strategy._close()
    module = Module()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(strategy(), max_epochs=2).fit(module, data(), ckpt_path=f"{folder}/old")
    return len(module.losses), [str(warning.message) for warning in caught]


def test_a_folder_from_before_manifests_loads_with_a_warning(on_ranks: Any, tmp_path: Path) -> None:
    for rank, (steps, said) in enumerate(on_ranks(from_before, WORLD, str(tmp_path), backend=None)):
        assert steps == 4
        assert rank == 1 or any("read without verification" in text for text in said)


def drawn() -> list[float]:
    return [torch.rand(1).item(), random.random(), float(np.random.rand())]


class Drawing(Module):
    """Draws from every generator right after a checkpoint was saved, and right after it was loaded."""

    numbers: list[float] | None = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.numbers = drawn()


def generators(rank: int, world_size: int, folder: str) -> Any:
    # Tensor ranks share theirs.
    run = trainer(strategy(data_parallel_size=2))
    run.fit(Module(), data())
    torch.manual_seed(rank)
    random.seed(rank)
    np.random.seed(rank)
    run.save_checkpoint(f"{folder}/a")
    wanted = drawn()
    module = Drawing()
    trainer(strategy(data_parallel_size=2), max_epochs=2).fit(module, data(), ckpt_path=f"{folder}/a")
    return wanted, module.numbers


def test_every_rank_gets_its_own_random_generators_back(on_ranks: Any, tmp_path: Path) -> None:
    (first, first_again), (second, second_again) = on_ranks(generators, WORLD, str(tmp_path), backend=None)
    assert first_again == first and second_again == second
    assert first != second


def one_rank_later(rank: int, world_size: int, folder: str) -> str:
    """One rank's part of the checkpoint is missing when it is to be read."""
    run = trainer(strategy())
    run.fit(Module(), data())
    run.save_checkpoint(f"{folder}/a")
    run.save_checkpoint(f"{folder}/b")
    (Path(folder) / "b" / f"__{rank}_0.distcp").unlink()
    content = bytearray((Path(folder) / "a" / f"rank_{rank}.pt").read_bytes())
    content[200] ^= 1
    if rank == 1:
        (Path(folder) / "a" / "rank_1.pt").write_bytes(content)
    errors = []
    for name in "ab":
        with pytest.raises(CheckpointError) as caught:
            trainer(strategy(), max_epochs=2).fit(Module(), data(), ckpt_path=f"{folder}/{name}")
        errors.append(str(caught.value))
    return "\n".join(errors)


def test_damage_found_by_one_rank_is_told_by_all(on_ranks: Any, tmp_path: Path) -> None:
    first, second = on_ranks(one_rank_later, WORLD, str(tmp_path), backend=None)
    assert first == second
    assert "a/rank_1.pt has changed" in first and "rank_0.pt" not in first
    assert all(f"b/__{rank}_0.distcp cannot be read (No such file or directory)" in first for rank in (0, 1))
