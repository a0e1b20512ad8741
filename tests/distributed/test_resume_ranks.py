"""Going on where a run stopped, on two ranks.

Catches a resumed run that sees other batches, draws other random numbers or counts other steps than one that was never
stopped, a damaged checkpoint that "last" or "best" loads, and an "auto" that overlooks a checkpoint or needs one.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from test_strategy import Module, config, data, trainer, whole
from torch import nn
from transformers import DeepseekV2ForCausalLM

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.errors import CheckpointError
from lit_models.data import TextDataModule

# 3 micro-batches of 2 sequences in a window, 4 windows in an epoch, 2 epochs and a half.
STEPS, PER_EPOCH, WINDOW = 10, 4, 3


class WithDropout(LightningModule):
    """Draws random numbers in every step, and its rate depends on the step."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.network = DeepseekV2ForCausalLM(config(vocab_size=264))
        self.dropout = nn.Dropout(0.3)
        self.losses: list[tuple[int, float]] = []
        self.rates: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.network(**batch).loss * self.dropout(torch.ones(1000)).mean()
        self.losses.append((self.global_step, loss.item()))
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        # Of the same generator as training: a validation that is left out shifts what follows.
        self.log("val", self.network(**batch).loss * torch.rand(()), sync_dist=True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self) -> None:
        self.weights = whole(self)


def text(folder: str) -> TextDataModule:
    return TextDataModule(
        source="text",
        paths=f"{folder}/text.txt",
        cache_dir=None,
        sequence_length=16,
        batch_size=2,
        val_fraction=0.1,
    )


def run(steps: int, **arguments: Any) -> Any:
    seed_everything(3, verbose=False)
    return trainer(
        NPUTensorParallelStrategy(init_seed=0, **arguments.pop("strategy", {})),
        max_epochs=None,
        max_steps=steps,
        accumulate_grad_batches=WINDOW,
        val_check_interval=2 * WINDOW,
        limit_val_batches=1,
        **arguments,
    )


def stopped_anywhere(rank: int, world: int, folder: str, stops: list[int]) -> Any:
    warnings.filterwarnings("ignore")
    straight = WithDropout()
    saving = ModelCheckpoint(f"{folder}/run", "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
    whole_run = run(STEPS, enable_checkpointing=True, callbacks=[saving])
    whole_run.fit(straight, text(folder))
    assert whole_run.num_training_batches == PER_EPOCH * WINDOW
    found = []
    for stop in stops:
        module = WithDropout()
        going_on = run(STEPS)
        torch.manual_seed(rank + 100)
        going_on.fit(module, text(folder), ckpt_path=f"{folder}/run/step={stop}.ckpt")
        found.append((module.losses, module.rates, module.weights, going_on.global_step, going_on.current_epoch))
    return (straight.losses, straight.rates, straight.weights, whole_run.current_epoch), found


def test_a_run_stopped_anywhere_goes_on_bit_for_bit(on_ranks: Any, tmp_path: Path) -> None:
    """After 1 to 9 steps: inside an epoch, before and after a validation, at the end of an epoch (4 and 8)."""
    (tmp_path / "text.txt").write_text("".join(f"{number} sheep jumped. " for number in range(26)))
    stops = [1, 2, 3, 4, 5, 7, 8, 9]
    for (losses, rates, weights, epochs), found in on_ranks(
        stopped_anywhere, 2, str(tmp_path), stops, backend=None, timeout=240
    ):
        assert len(losses) == STEPS * WINDOW and len({loss for _, loss in losses}) == len(losses)
        for stop, (again, rates_again, weights_again, step, epoch) in zip(stops, found, strict=True):
            assert again == losses[stop * WINDOW :], stop
            assert rates_again == rates[stop * WINDOW :], stop
            assert all(torch.equal(weights_again[name], value) for name, value in weights.items()), stop
            assert step == STEPS and epoch == epochs


class PerRank(torch.utils.data.DataLoader):
    """Remembers a number that differs from rank to rank."""

    def __init__(self, number: int) -> None:
        super().__init__(torch.zeros(8, 4, dtype=torch.int64), batch_size=2)
        self.number = number

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def per_rank(rank: int, world: int, folder: str, number: int, layout: dict[str, int], resume: bool) -> Any:
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        own = PerRank(number + rank)
        own_run = trainer(
            use_distributed_sampler=False,
            strategy=NPUTensorParallelStrategy(init_seed=0, **layout),
            max_steps=3 if resume else 2,
            max_epochs=None,
        )
        own_run.fit(Module(), own, ckpt_path=f"{folder}/x.ckpt" if resume else None)
        if not resume:
            own_run.save_checkpoint(f"{folder}/x.ckpt")
        told = [str(warning.message) for warning in caught]
    return own.number, any("stood at different places" in text for text in told)


def test_every_rank_gets_the_position_of_its_own_loader(on_ranks: Any, tmp_path: Path) -> None:
    tensor, over_data = {"tensor_parallel_size": 2}, {"data_parallel_size": 2, "expert_parallel_size": 2}
    on_ranks(per_rank, 2, str(tmp_path), 40, tensor, False, backend=None)
    assert on_ranks(per_rank, 2, str(tmp_path), 0, tensor, True, backend=None) == [(40, False), (41, False)]
    # In another layout there is nobody to whom rank 1's position belongs; it is said, and nobody gets rank 0's.
    lost = on_ranks(per_rank, 2, str(tmp_path), 0, over_data, True, backend=None)
    assert [number for number, _ in lost] == [0, 1] and lost[0][1]


def three_checkpoints(rank: int, world: int, folder: str) -> list[str]:
    saving = ModelCheckpoint(f"{folder}/run", "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
    trainer(max_steps=3, enable_checkpointing=True, callbacks=[saving]).fit(Module(), data())
    return sorted(path.name for path in Path(folder, "run").iterdir())


def loaded_from(rank: int, world: int, folder: str, word: str, callback: bool = True) -> Any:
    saving = [ModelCheckpoint(f"{folder}/run", "{step}", every_n_train_steps=10, save_last=True)] if callback else []
    fit = trainer(max_steps=4, enable_checkpointing=callback, callbacks=saving)
    module = Module()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit.fit(module, data(), ckpt_path=word)
        except CheckpointError as error:
            return str(error)
    skipped = [str(warning.message) for warning in caught if "is skipped" in str(warning.message)]
    return 4 - len(module.losses), skipped


def damage(path: Path) -> None:
    (file,) = path.glob("__0_*.distcp")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def test_damaged_checkpoints_are_passed_over_by_last_and_auto(on_ranks: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert on_ranks(three_checkpoints, 2, str(tmp_path), backend=None)[0] == [
        "last.ckpt",
        "step=1.ckpt",
        "step=2.ckpt",
        "step=3.ckpt",
    ]

    def outcome(word: str, **options: Any) -> Any:
        first, second = on_ranks(loaded_from, 2, str(tmp_path), word, backend=None, **options)
        assert (first if isinstance(first, str) else first[0]) == (second if isinstance(second, str) else second[0])
        # A run that goes on saves anew at its end; the next one shall find what this one found.
        return first

    damage(folder / "last.ckpt")
    (folder / "step=3.ckpt/manifest.json").unlink()
    step, skipped = outcome("last")
    assert step == 2 and len(skipped) == 2
    assert any("last.ckpt is skipped" in text and "__0_" in text for text in skipped)
    assert any("step=3.ckpt is skipped" in text and "no manifest.json" in text for text in skipped)


def test_auto_starts_anew_without_a_checkpoint_and_goes_on_with_one(on_ranks: Any, tmp_path: Path) -> None:
    assert [result[0] for result in on_ranks(loaded_from, 2, str(tmp_path), "auto", backend=None)] == [0, 0]
    # It saved its end; there is nothing left to train.
    assert [result[0] for result in on_ranks(loaded_from, 2, str(tmp_path), "auto", backend=None)] == [4, 4]
    (text,) = set(on_ranks(loaded_from, 2, str(tmp_path), "auto", False, backend=None))
    assert "the Trainer has no ModelCheckpoint" in text


def test_a_path_is_never_replaced_by_another(on_ranks: Any, tmp_path: Path) -> None:
    on_ranks(three_checkpoints, 2, str(tmp_path), backend=None)
    damage(tmp_path / "run/step=3.ckpt")
    (text,) = set(on_ranks(loaded_from, 2, str(tmp_path), f"{tmp_path}/run/step=3.ckpt", backend=None))
    assert "step=3.ckpt is damaged" in text and "__0_" in text


def best(rank: int, world: int, folder: str) -> Any:
    class Measured(Module):
        def on_train_batch_end(self, *arguments: Any) -> None:
            self.log("step_number", float(self.global_step))

    saving = ModelCheckpoint(
        f"{folder}/run", "{step}", monitor="step_number", mode="max", every_n_train_steps=1, save_top_k=2
    )
    run_ = trainer(max_steps=3, enable_checkpointing=True, callbacks=[saving])
    module = Measured()
    run_.fit(module, data())
    chosen = saving.best_model_path[-11:]
    if rank == 0:
        damage(Path(folder, "run/step=3.ckpt"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_.test(module, data(), ckpt_path="best", verbose=False)
    return any("step=3.ckpt is skipped" in str(w.message) for w in caught), chosen


def test_a_damaged_best_is_passed_over(on_ranks: Any, tmp_path: Path) -> None:
    (first, _) = on_ranks(best, 2, str(tmp_path), backend=None)
    assert first == (True, "step=3.ckpt")
