"""Catches an expert load that adds up wrongly over batches, layers or steps, a pick that is lost without a word, a
device that is read in every step, and a picture that is wrong, missing or takes the run down with it.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_npu_tp.callbacks import ExpertLoadMonitor
from lightning_npu_tp.callbacks import expert_load as monitor_module
from lightning_npu_tp.callbacks.expert_load_metric import ExpertLoad, expert_load
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.models.moe.router import TopKRouter
from lightning_npu_tp.tools.testing.operators import CountOperators

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*treespec")

NUM_EXPERTS, TOP_K = 4, 2


class Block(nn.Module):
    """As much of a mixture layer as the monitor looks at."""

    def __init__(self, num_experts: int = NUM_EXPERTS, dropped: int = 0) -> None:
        super().__init__()
        self.gate = TopKRouter(hidden_size=8, num_experts=num_experts, top_k=TOP_K)
        self.tokens_per_expert: Tensor | None = None
        self.dropped = dropped

    def forward(self, x_TD: Tensor) -> Tensor:
        routing = self.gate(x_TD)
        picks = routing.experts_TK.flatten()
        counts = torch.zeros(self.gate.weight.shape[0], dtype=torch.int64)
        counts = counts.scatter_add(0, picks, torch.ones_like(picks))
        self.tokens_per_expert = counts - self.dropped * (counts == counts.max())
        return routing.weights_TK.sum(1, keepdim=True) * x_TD


class Model(L.LightningModule):
    def __init__(self, *blocks: Block) -> None:
        super().__init__()
        torch.manual_seed(5)
        # A dense layer first, as in the real models: the labels in the picture follow the decoder's numbers.
        self.layers = nn.ModuleList([nn.Identity(), *(blocks or (Block(), Block()))])
        for block in self.layers[1:]:
            nn.init.normal_(block.gate.weight)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = nn.functional.one_hot(batch["input_ids"].flatten(), 8).to(torch.float32)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # The weights stay, so that a test can route the same tokens again.
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Keeps(Logger):
    """The metrics by step."""

    name, version = "", ""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(name.startswith("expert_load") for name in metrics):
            self.seen[step] = metrics

    def log_hyperparams(self, *args: Any) -> None:
        pass


def batches(number: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 8, (number, 2, 6), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": batch} for batch in ids]


def fit(model: Model, monitor: ExpertLoadMonitor, number: int = 5, **settings: Any) -> Keeps:
    logger = Keeps()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=logger, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[monitor], max_epochs=1, log_every_n_steps=1, **settings,
    )  # fmt: skip
    trainer.fit(model, DataLoader(batches(number), batch_size=None), DataLoader(batches(7)[6:], batch_size=None))
    return logger


def counted(model: Model, indices: range) -> Tensor:
    """[L, E] of these batches, one token at a time."""
    counts = torch.zeros(len(model.layers) - 1, NUM_EXPERTS, dtype=torch.int64)
    for index in indices:
        model.training_step(batches(8)[index], 0)
        for number, block in enumerate(model.layers[1:]):
            counts[number] += block.tokens_per_expert
    return counts


# --- the metric --------------------------------------------------------------------------------


def test_the_numbers_follow_the_definition() -> None:
    load = ExpertLoad(3, 4)
    load.update(torch.tensor([[1, 2, 3, 0], [2, 2, 2, 0], [6, 0, 0, 0]]), 6)
    load.update(torch.tensor([[1, 0, 3, 0], [0, 0, 0, 2], [3, 0, 0, 0]]), torch.tensor(4))
    result = load.compute()
    assert result["tokens"].tolist() == [[2, 2, 6, 0], [2, 2, 2, 2], [9, 0, 0, 0]]
    assert result["max_over_mean"].tolist() == pytest.approx([6 / 2.5, 1.0, 4.0])
    uneven = -sum(share * math.log(share) for share in (0.2, 0.2, 0.6)) / math.log(4)
    assert result["entropy"].tolist() == pytest.approx([uneven, 1.0, 0.0])
    assert result["dropped"].tolist() == [0, 2, 1]


def test_large_counts_are_exact_and_a_reset_forgets() -> None:
    load = ExpertLoad(2, 2)
    load.update(torch.tensor([[2**40, 2**40 + 1], [2**41, 0]]), 2**41 + 2)
    assert load.compute()["dropped"].tolist() == [1, 2]
    load.reset()
    load.update(torch.tensor([[1, 3], [2, 2]]), 4)
    assert load.compute()["tokens"].tolist() == [[1, 3], [2, 2]] and load.compute()["dropped"].tolist() == [0, 0]


# --- the callback ------------------------------------------------------------------------------


def test_each_interval_logs_the_worst_layer_of_its_own_batches(tmp_path: Path) -> None:
    model = Model()
    logger = fit(model, ExpertLoadMonitor(tmp_path / "new", every_n_steps=2), number=5, val_check_interval=1)
    for step, indices in ((1, range(0, 2)), (3, range(2, 4))):
        load = expert_load(counted(model, indices), torch.tensor(2 * 2 * 12))
        assert logger.seen[step] == {
            "expert_load/max_over_mean": pytest.approx(load["max_over_mean"].max().item()),
            "expert_load/entropy": pytest.approx(load["entropy"].min().item()),
            "expert_load/dropped": 0.0,
        }
    # The loss's rows count from 0 too. No value is repeated in between.
    assert sorted(logger.seen) == [1, 3] and logger.seen[1] != logger.seen[3]
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "expert_load_step00000002.png",
        "expert_load_step00000004.png",
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (tmp_path / "new").iterdir())


def test_an_interval_is_of_optimizer_steps_and_counts_their_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = []
    monkeypatch.setattr(
        ExpertLoadMonitor, "_report", lambda self, trainer, step: reports.append((step, self._load.compute()))
    )
    model = Model()
    fit(model, ExpertLoadMonitor(every_n_steps=2), number=8, accumulate_grad_batches=2)
    assert [step for step, _ in reports] == [2, 4]
    for (_, load), indices in zip(reports, (range(0, 4), range(4, 8)), strict=True):
        assert torch.equal(load["tokens"], counted(model, indices)) and load["dropped"].tolist() == [0, 0]


def test_a_lost_pick_is_told() -> None:
    model = Model(Block(), Block(dropped=1))
    logger = fit(model, ExpertLoadMonitor(every_n_steps=1), number=1)
    assert logger.seen[0]["expert_load/dropped"] >= 1


def test_the_device_is_read_at_the_end_of_an_interval_only() -> None:
    class Counts(ExpertLoadMonitor):
        reads: list[int] = []

        def on_train_batch_end(self, *args: Any) -> None:
            with CountOperators() as operators:
                super().on_train_batch_end(*args)
            self.reads.append(len(operators.found()))

    fit(Model(), Counts(every_n_steps=3), number=5)
    assert [count > 0 for count in Counts.reads] == [False, False, True, False, False]


def test_the_picture_shows_each_layers_load_against_an_even_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    counts = torch.tensor([[10, 10, 10, 10], [20, 10, 5, 5], [40, 0, 0, 0]])
    monitor_module._render(expert_load(counts, torch.tensor(42)), ["1", "2", "3"], 1200)
    axes, scale = figures[0].axes
    image = axes.images[0]
    # Octaves from even: 0 is even, twice the load is 1.
    assert image.get_array().tolist() == [[0, 0, 0, 0], [1, 0, -1, -1], [2, -3, -3, -3]]
    assert image.get_clim() == (-3, 3)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "3"]
    assert axes.get_xlabel() == "expert" and axes.get_ylabel() == "decoder layer"
    title = axes.get_title()
    assert "step 1,200" in title and "40 picks" in title and "6 dropped" in title and "4.00 times" in title
    assert "in layer 3" in title
    assert "1.0 = even" in scale.get_ylabel()
    assert [label.get_text() for label in scale.get_yticklabels()][3] == "1.0"


def test_layers_are_called_by_the_decoders_numbers() -> None:
    names = list(monitor_module._mixture_layers(Model()))
    assert [monitor_module._layer_number(name) for name in names] == ["1", "2"]
    assert monitor_module._layer_number("model.layers.26.mlp") == "26"
    assert monitor_module._layer_number("moe") == "moe"


def test_a_full_disk_under_a_picture_is_told_and_the_training_stands(tmp_path: Path, caplog: Any) -> None:
    picture = tmp_path / "expert_load_step00000001.png"
    picture.symlink_to("/dev/full")
    with caplog.at_level(logging.ERROR):
        logger = fit(Model(), ExpertLoadMonitor(tmp_path, every_n_steps=1), number=2)
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert str(picture) in record.message and "No space left" in record.message and "needs" in record.message
    assert logger.seen[1] and (tmp_path / "expert_load_step00000002.png").is_file()


def test_what_cannot_work_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="every_n_steps=0"):
        ExpertLoadMonitor(every_n_steps=0)
    model = Model()
    model.layers = nn.ModuleList([nn.Linear(8, 8)])
    with pytest.raises(ConfigError, match="no mixture of experts in Model.*callbacks.expert_load=null"):
        fit(model, ExpertLoadMonitor())
    with pytest.raises(ConfigError, match=r"\[4, 8\] experts"):
        fit(Model(Block(4), Block(8)), ExpertLoadMonitor())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="matplotlib.*folder=null"):
        ExpertLoadMonitor(tmp_path)
    assert ExpertLoadMonitor().folder is None
