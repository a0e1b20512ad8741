"""Catches: throughput that counts validation time or tensor ranks twice, a picture or log file that takes the run
down with it, a progress bar that counts towards the wrong end, a warm-up that leaves a trace in the training.
"""

from __future__ import annotations

import csv
import importlib.util
import logging
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.callbacks import LossCurve, TokensPerSecond, TrainingProgressBar, Warmup, throughput
from lightning_npu_tp.callbacks import warmup as warmup_module
from lightning_npu_tp.errors import ConfigError, RankFailure
from lit_models.causal_lm import LitCausalLM
from lit_models.run.loggers import CSVMetrics, tensorboard

pytestmark = pytest.mark.filterwarnings(
    # Lightning's advice about worker processes and logging intervals, and its use of a deprecated torch name.
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec",
    "ignore:.*treespec",
)

# Dropout draws random numbers in every forward, so that a warm-up which moves the generator shows.
CONFIG = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "first_k_dense_replace": 1,
    "num_attention_heads": 2, "q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
    "v_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 8, "max_position_embeddings": 64, "attention_dropout": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        ids = torch.randint(0, 32, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids.clone()}


class Probe(L.Callback):
    """Counts what the model is asked for, and records losses and the state at the first step."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.first: dict[str, object] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if not self.first:
            self.first = {
                "torch": torch.get_rng_state().tolist(),
                "numpy": np.random.get_state()[1].tolist(),
                "python": random.getstate(),
                "calls": int(pl_module.calls),
                "gradients": [p.grad is None for p in pl_module.parameters()],
                "modes": [module.training for module in pl_module.modules()],
                "batch": batch["input_ids"].tolist(),
                "optimizer": trainer.optimizers[0].state_dict()["state"],
            }

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].detach().clone())


def small_model() -> LitCausalLM:
    torch.manual_seed(3)
    module = LitCausalLM(
        architecture="deepseek_v2", config=CONFIG, build_device="cpu", optimizer=partial(torch.optim.AdamW, lr=1e-2)
    )
    module.configure_model()
    module.register_buffer("calls", torch.tensor(0))

    def count(*args: object) -> None:
        module.calls += 1
        random.random()
        np.random.rand()

    module.model.register_forward_pre_hook(count)
    return module


def fit(module: L.LightningModule, callbacks: list[L.Callback], **settings) -> L.Trainer:
    defaults = {"max_steps": 3, "logger": False, "limit_val_batches": 0, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu", devices=1, enable_checkpointing=False, enable_model_summary=False, callbacks=callbacks,
        log_every_n_steps=1, **{**defaults, **settings},
    )  # fmt: skip
    train = DataLoader(Tokens(), batch_size=2, shuffle=True)
    trainer.fit(module, train, DataLoader(Tokens(), batch_size=4))
    return trainer


# --- warm-up -----------------------------------------------------------------------------------


def run_with(*callbacks: L.Callback) -> tuple[Probe, LitCausalLM]:
    L.seed_everything(5, verbose=False)
    probe, module = Probe(), small_model()
    # A user may freeze a part's mode; the warm-up must not thaw it.
    module.model.model.norm.eval()
    fit(module, [*callbacks, probe])
    return probe, module


@pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode")
def test_a_warmed_up_run_is_bitwise_the_run_without() -> None:
    plain, plain_module = run_with()
    warmup = Warmup(batch_size=2, max_length=5)
    warmed, warmed_module = run_with(warmup)

    assert "forward and backward of [2, 5] tokens" in warmup.report
    assert warmed.first == plain.first
    assert all(plain.first["gradients"]) and plain.first["calls"] == 0 and False in plain.first["modes"]
    assert torch.equal(torch.stack(warmed.losses), torch.stack(plain.losses))
    for (name, a), (_, b) in zip(plain_module.state_dict().items(), warmed_module.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_the_warm_up_really_runs_the_model_forward_and_backward() -> None:
    module, seen = small_model(), []
    module.model.lm_head.register_full_backward_hook(lambda *args: seen.append(("backward", args[2][0].shape[:2])))
    module.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(("forward", kwargs["input_ids"].shape)), with_kwargs=True
    )
    fit(module, [Warmup(batch_size=1, max_length=7)], max_steps=1)
    assert seen[:2] == [("forward", (1, 7)), ("backward", (1, 7))]
    assert len(seen) == 4


def test_the_warm_up_waits_for_the_device_before_it_reads_the_clock(monkeypatch) -> None:
    """Work on a card is only queued when the call returns; without the waits nothing would have been warmed up."""
    module, seen = small_model(), []
    module.model.register_forward_pre_hook(lambda *args: seen.append("forward"))
    stand_in = SimpleNamespace(synchronize=lambda device: seen.append("wait"))
    monkeypatch.setattr(warmup_module, "torch_module", lambda device_type: stand_in)
    fit(module, [Warmup(max_length=4)], max_steps=1)
    assert seen[:3] == ["wait", "forward", "wait"]


def test_given_tokens_replace_those_of_the_data_set() -> None:
    warmup = Warmup(tokens=[[1, 2, 3], [4, 5, 6]])
    fit(small_model(), [warmup], max_steps=1)
    assert "of [2, 3] tokens" in warmup.report


def test_every_communicator_is_used_under_a_long_time_out_that_ends_with_the_warm_up(monkeypatch) -> None:
    module = small_model()
    module.model = None
    module._build_device = "meta"
    seen: list[float] = []
    all_reduce = torch.distributed.all_reduce

    def seconds(group) -> float:
        return warmup_module._timeout_of(group).total_seconds()

    def note(tensor, group):
        seen.append(seconds(group))
        return all_reduce(tensor, group=group)

    class After(L.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            meshes = trainer.strategy.meshes
            groups = {meshes.tensor_group, meshes.data_group, meshes.expert_group, torch.distributed.group.WORLD}
            after.update({id(group): seconds(group) for group in groups})
            monkeypatch.undo()

    after: dict[int, float] = {}
    monkeypatch.setattr(warmup_module.dist, "all_reduce", note)
    warmup = Warmup(max_length=4, timeout_s=500)
    fit(module, [warmup, After()], strategy=NPUTensorParallelStrategy(timeout_s=50), max_steps=1)
    assert seen == [500.0] * len(after) and set(after.values()) == {50.0}
    assert f"{len(after)} communicators" in warmup.report


def test_a_failing_warm_up_restores_the_generators_too() -> None:
    L.seed_everything(5, verbose=False)
    module = small_model()
    before = {}

    class Breaks(Warmup):
        def on_train_start(self, trainer, pl_module) -> None:
            before["state"] = torch.get_rng_state()
            super().on_train_start(trainer, pl_module)

    with pytest.raises(IndexError):
        fit(module, [Breaks(tokens=[[99, 99]])])  # beyond the vocabulary
    assert torch.equal(torch.get_rng_state(), before["state"])


def test_a_module_without_a_transformers_model_is_told_so() -> None:
    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.layer.weight.sum()

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ConfigError, match="transformers model inside Plain.*warmup=none"):
        fit(Plain(), [Warmup()])


def test_a_data_set_without_an_index_needs_tokens() -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Tokens()[i] for i in range(8))

    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Warmup()], limit_val_batches=0,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="warmup.tokens"):
        trainer.fit(small_model(), DataLoader(Stream(), batch_size=2), DataLoader(Tokens()))


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"max_length": 1}])
def test_a_warm_up_batch_without_a_prediction_is_refused(settings) -> None:
    with pytest.raises(ConfigError, match="no batch to learn from"):
        Warmup(**settings)


# --- throughput --------------------------------------------------------------------------------


class Clock:
    """Each training batch takes 2 seconds, each validation 100, each checkpoint 1000."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: self.now))


class Spends(L.Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.rates: list[float | None] = []

    def on_train_batch_start(self, *args) -> None:
        self.clock.now += 2

    def on_validation_epoch_start(self, *args) -> None:
        self.clock.now += 100

    def on_train_batch_end(self, trainer, *args) -> None:
        rate = trainer.callback_metrics.get("train/tokens_per_second")
        self.rates.append(None if rate is None else float(rate))


def test_throughput_leaves_out_the_first_batch_and_validation(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    spends = Spends(clock)
    settings = {"limit_val_batches": 1, "val_check_interval": 1, "num_sanity_val_steps": 0, "max_steps": 4}
    fit(small_model(), [TokensPerSecond(window=2), spends], **settings)
    # 2 sequences of 12 tokens in 2 seconds; nothing is known after one batch.
    assert spends.rates == [None, 12.0, 12.0, 12.0]


def test_throughput_counts_data_ranks_and_not_tensor_ranks() -> None:
    marks = TokensPerSecond(window=1)
    logged = {}
    marks.log = logged.__setitem__
    batch = {"input_ids": torch.zeros(2, 5)}
    for ranks, factor in (({"num_replicas": 3, "rank": 0}, 3), (None, 1)):
        marks._restart()
        marks.on_train_batch_end(SimpleNamespace(distributed_sampler_kwargs=ranks), None, None, batch, 0)
        assert marks._tokens == 10 * factor


def test_a_checkpoint_begins_a_new_window() -> None:
    marks = TokensPerSecond(window=5)
    marks._marks.append((0.0, 10))
    marks.on_save_checkpoint(None, None, {})
    assert not marks._marks


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="window=0"):
        TokensPerSecond(window=0)


# --- progress ----------------------------------------------------------------------------------


def test_without_a_terminal_the_progress_is_told_in_lines(capsys) -> None:
    settings = {"limit_val_batches": 1, "val_check_interval": 2, "num_sanity_val_steps": 0, "max_steps": 4}
    bar = TrainingProgressBar(lines_every_n_steps=3)
    fit(small_model(), [TokensPerSecond(), bar], enable_progress_bar=True, **settings)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split(":")[0] for line in lines] == ["step 1/4", "step 2", "step 3/4", "step 4/4", "step 4"]
    assert "validation loss" in lines[1]
    assert all(name in lines[2] for name in ("loss 3.", "tokens/s ", "lr 1.00e-02"))


def test_the_bar_ends_with_the_run_and_not_with_the_epoch() -> None:
    ends = []

    class Looks(L.Callback):
        def on_train_epoch_start(self, trainer, *args) -> None:
            ends.append(trainer.progress_bar_callback.total_train_batches)

    # Four batches an epoch, two a step: the run ends in the middle of the second epoch.
    bar = TrainingProgressBar(lines_every_n_steps=0)
    fit(small_model(), [bar, Looks()], enable_progress_bar=True, max_steps=3, accumulate_grad_batches=2)
    assert ends == [4, 2]


def test_the_bar_shows_loss_speed_and_rate_and_reads_them_every_n_steps(monkeypatch) -> None:
    bar = TrainingProgressBar(every_n_steps=2)
    trainer = SimpleNamespace(
        callback_metrics={"train/loss": torch.tensor(2.5), "train/tokens_per_second": torch.tensor(1234.0)},
        optimizers=[SimpleNamespace(param_groups=[{"lr": 3e-4}])],
        global_step=2,
    )
    shown = {"loss": "2.5000", "tokens/s": "1,234", "lr": "3.00e-04"}
    assert bar.get_metrics(trainer, None) == shown
    trainer.callback_metrics, trainer.global_step = {"train/loss": torch.tensor(1.5)}, 3
    assert bar.get_metrics(trainer, None) == shown
    trainer.global_step = 4
    assert bar.get_metrics(trainer, None)["loss"] == "1.5000"


# --- loss curve --------------------------------------------------------------------------------


def test_the_curve_has_each_step_once_and_every_validation(tmp_path) -> None:
    curve = LossCurve(tmp_path / "new" / "loss.png")
    settings = {"limit_val_batches": 1, "val_check_interval": 2, "num_sanity_val_steps": 1}
    fit(small_model(), [curve], accumulate_grad_batches=2, **settings)
    assert [step for step, _ in curve._train] == [1, 2, 3]
    assert [step for step, _ in curve._val] == [1, 2, 3]
    assert all(2 < loss < 5 for _, loss in curve._train + curve._val)
    assert curve.path.read_bytes().startswith(b"\x89PNG")


def test_the_curve_of_an_interrupted_run_is_drawn(tmp_path) -> None:
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer, *args) -> None:
            raise RuntimeError("stop")

    curve = LossCurve(tmp_path / "loss.png")
    with pytest.raises(RuntimeError, match="stop"):
        fit(small_model(), [curve, Stops()])
    assert curve.path.exists() and len(curve._train) == 1


class OnABrokenCard(torch.Tensor):
    """A loss that cannot be read; `asked` counts who tried."""

    asked = 0

    @property
    def device(self):
        return torch.device("cuda", 0)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.stack:
            OnABrokenCard.asked += 1
            raise RuntimeError("the card is gone")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(
    ("error", "asked"),
    [(RuntimeError("error code is 507015"), 0), (RankFailure("another"), 0), (ValueError("the user's"), 1)],
)
def test_a_broken_card_is_not_asked_for_losses_and_does_not_replace_the_error(tmp_path, error, asked) -> None:
    OnABrokenCard.asked = 0

    class Fails(L.Callback):
        def on_train_batch_end(self, trainer, *args) -> None:
            curve._waiting.append((2, torch.zeros(()).as_subclass(OnABrokenCard)))
            raise error

    curve = LossCurve(tmp_path / "loss.png")
    with pytest.raises(type(error), match=str(error)):
        fit(small_model(), [curve, Fails()])
    assert OnABrokenCard.asked == asked and curve.path.exists()
    # What the host has already is drawn.
    assert len(curve._train) == 1 - asked


def test_a_full_disk_under_the_curve_is_told_and_the_training_stands(tmp_path, caplog) -> None:
    picture = tmp_path / "loss.png"
    picture.symlink_to("/dev/full")
    with caplog.at_level(logging.ERROR):
        trainer = fit(small_model(), [LossCurve(picture)])
    assert trainer.state.finished and trainer.global_step == 3
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert str(picture) in record.message and "No space left" in record.message and "needs" in record.message


def test_a_missing_matplotlib_is_told_before_training(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="matplotlib.*callbacks.loss_curve=null"):
        LossCurve(tmp_path / "loss.png")


# --- loggers -----------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_csv_takes_new_columns_and_keeps_old_rows(tmp_path) -> None:
    logger = CSVMetrics(tmp_path / "run" / "metrics.csv", flush_every_n_rows=1)
    logger.log_metrics({"a": 1.0}, step=1)
    logger.log_metrics({"b": 2.0}, step=2)
    logger.log_metrics({"a": 3.0}, step=3)
    logger.finalize("success")
    assert rows_of(logger.path) == [
        {"step": "1", "a": "1.0", "b": ""},
        {"step": "2", "a": "", "b": "2.0"},
        {"step": "3", "a": "3.0", "b": ""},
    ]


def test_a_second_logger_of_the_same_file_continues_it(tmp_path) -> None:
    for step in (1, 2):
        logger = CSVMetrics(tmp_path / "metrics.csv")
        logger.log_metrics({"a": float(step)}, step=step)
        logger.finalize("success")
    assert [row["step"] for row in rows_of(tmp_path / "metrics.csv")] == ["1", "2"]


def test_rows_that_a_full_disk_refuses_are_written_later(tmp_path, caplog, monkeypatch) -> None:
    logger = CSVMetrics(tmp_path / "metrics.csv", flush_every_n_rows=1)
    logger.log_metrics({"a": 1.0}, step=1)
    good = logger.path.read_bytes()

    opened = Path.open

    def fails_half_way(self, mode="r", **kwargs):
        if mode == "a":
            with opened(self, "ab") as file:
                file.write(b"2,")
            return opened(Path("/dev/full"), "w")
        return opened(self, mode, **kwargs)

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(Path, "open", fails_half_way)
        logger.log_metrics({"a": 2.0}, step=2)
        logger.log_metrics({"a": 3.0}, step=3)
    assert logger.path.read_bytes() == good
    assert [str(logger.path) in record.message for record in caplog.records] == [True]  # told once, not each time
    logger.log_metrics({"a": 4.0}, step=4)
    assert [row["a"] for row in rows_of(logger.path)] == ["1.0", "2.0", "3.0", "4.0"]


def test_a_full_disk_leaves_the_old_file_when_a_column_is_added(tmp_path, caplog) -> None:
    logger = CSVMetrics(tmp_path / "metrics.csv", flush_every_n_rows=1)
    logger.log_metrics({"a": 1.0}, step=1)
    good = logger.path.read_bytes()
    (tmp_path / ".metrics.csv.new").symlink_to("/dev/full")
    logger.log_metrics({"b": 2.0}, step=2)
    assert logger.path.read_bytes() == good
    assert "No space left" in caplog.text
    logger.finalize("success")
    assert [row["b"] for row in rows_of(logger.path)] == ["", "2.0"]


def test_tensorboard_is_an_error_only_where_it_was_asked_for(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tensorboard(tmp_path, required=False) is None
    with pytest.raises(ConfigError, match=r"tensorboard.*lightning-npu-tp\[tracking\]"):
        tensorboard(tmp_path)
