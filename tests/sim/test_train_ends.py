"""What surrounds a step, on simulated cards through the real torch_npu: accumulation, export, throughput, the scaler.

Catches an export that fetches other weights from the cards than were trained, a share of the card's peak that is not
logged, and ranks that disagree about a step whose gradients overflowed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from fused import distance
from test_train import ON_FOUR, RELATIVE, ROOT, SEQUENCES, apart, column, compose, sizes

TWO = {"trainer.accelerator": "npu", "trainer.devices": 2}


def run(rank: int, world_size: int, folder: str, overrides: dict[str, Any]) -> None:
    sys.path.insert(0, str(ROOT))
    import train

    train.train(compose(folder, overrides))


def test_cards_accumulate_and_export_what_the_cpu_does(on_ranks: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    more = {"trainer.accumulate_grad_batches": 2, "export": "true"}
    alone = {**more, "data.batch_size": SEQUENCES // 2}
    on_ranks(run, 1, str(tmp_path / "cpu"), alone, backend=None, timeout=120)
    on_four = {**ON_FOUR, **sizes(2, 2, 4, **more), "data.batch_size": SEQUENCES // 4}
    on_ranks(run, 4, str(tmp_path / "npu"), on_four, backend=None, timeout=400)
    got, wanted = (column(tmp_path / place, "train/loss") for place in ("npu", "cpu"))
    assert apart(got, wanted) <= RELATIVE
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / place / "export") for place in ("npu", "cpu")]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    for name, weight in states[1].items():
        assert distance(states[0][name], weight) <= 1e-3, name
    tokens = torch.arange(48).reshape(2, 24)
    losses = [model(input_ids=tokens, labels=tokens).loss.item() for model in models]
    assert apart(losses[:1], losses[1:]) <= RELATIVE


def test_cards_log_the_share_of_their_peak(on_ranks: Any, tmp_path: Path) -> None:
    more = {"trainer.precision": "bf16-mixed", "callbacks.throughput.window": 2, "trainer.log_every_n_steps": 1}
    overrides = {**TWO, **sizes(1, 2, 2, **more)}
    on_ranks(run, 2, str(tmp_path / "run"), overrides, backend=None, timeout=200)
    shares = column(tmp_path / "run", "train/mfu")
    assert shares and all(0 < share < 1 for share in shares)
    assert all(peak > 0 for peak in column(tmp_path / "run", "train/peak_memory_gib"))
    assert all(seconds > 0 for seconds in column(tmp_path / "run", "train/step_time_s"))


def overflow(rank: int, world_size: int) -> list[tuple[float, float]]:
    """After each of three steps: how far this rank's weights have moved in it, and the scale."""
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.utils.data import DataLoader
    from transformers import LlamaConfig, LlamaForCausalLM

    from lightning_npu_tp import NPUTensorParallelStrategy
    from lightning_npu_tp.parallel.tensor_region import local
    from lightning_npu_tp.trainer.precision import MixedPrecision

    class Job(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
            self.network = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.network(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Watch(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[float, float]] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.before = [local(parameter).detach().clone() for parameter in pl_module.parameters()]

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.fit_loop.batch_idx == 1 and rank == 1:
                # Of a matrix that is cut in two: the other rank has none of it.
                local(pl_module.network.model.layers[0].mlp.up_proj.weight.grad)[0, 0] = torch.inf

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            pairs = zip(self.before, pl_module.parameters(), strict=True)
            moved = sum(float((local(now) - before).abs().sum()) for before, now in pairs)
            self.seen.append((moved, trainer.precision_plugin.scaler.get_scale()))

    torch.manual_seed(0)
    watch = Watch()
    trainer = Trainer(
        accelerator="npu",
        devices=2,
        strategy=NPUTensorParallelStrategy(),
        plugins=[MixedPrecision("16-mixed", "npu")],
        max_steps=3,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Job(), DataLoader(torch.randint(0, 16, (8, 6)), batch_size=2))
    return watch.seen


def test_one_cards_overflow_is_everybodys_and_costs_one_step(on_ranks: Any) -> None:
    for seen in on_ranks(overflow, 2, backend=None, timeout=120):
        moved, scales = zip(*seen, strict=True)
        assert moved[0] > 0 and moved[1] == 0 and moved[2] > 0, moved
        assert scales == (65536.0, 32768.0, 32768.0)
