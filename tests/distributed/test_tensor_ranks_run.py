"""Tensor ranks that see other data or draw other random numbers: given the same, or refused by name.

Catches what trains on a mixture of both without an error: a sampler over all ranks, an iterable set or a dropout that
draws, workers and sampled tokens that are seeded by the global rank.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler
from transformers import DeepseekV2ForCausalLM

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.errors import DataError
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.tools.testing.models import tiny_deepseek_v2_config
from lightning_npu_tp.trainer.tensor_ranks import EVERY, FIRST, TensorRanks

ROWS = torch.randint(2, 128, (8, 6), generator=torch.Generator().manual_seed(3))


def draw() -> list[float]:
    return [torch.rand(1).item(), random.random(), float(np.random.rand())]


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


class Module(LightningModule):
    """Draws in its hooks and its steps, and has a dropout in a layer of its own."""

    def __init__(self, seed_again: bool = False) -> None:
        super().__init__()
        config = tiny_deepseek_v2_config(num_hidden_layers=2)
        with torch.device("meta"):
            self.network = DeepseekV2ForCausalLM(config)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(128, 1))
        self.drawn: list[Any] = []
        self.seed_again = seed_again

    def setup(self, stage: str) -> None:
        self.drawn.append(draw())

    def on_fit_start(self) -> None:
        if self.seed_again and self.global_rank % 2 == 0:
            seed(11)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.network(input_ids=batch, labels=batch, gather_logits=True)
        loss = output.loss + self.head(output.logits).square().mean()
        self.drawn.append([*draw(), loss.item()])
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Shuffled(IterableDataset):
    """As users write it: an order of its own, of the global generators."""

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(4).tolist()
        random.shuffle(order)
        yield from ROWS[np.random.permutation(order)]


def trainer(layout: tuple[int, int], **settings: Any) -> Trainer:
    data, tensor = layout
    strategy = NPUTensorParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor, init_seed=0)
    return Trainer(
        accelerator="cpu", devices=data * tensor, strategy=strategy, max_epochs=1, logger=False, num_sanity_val_steps=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip


def train_unseeded(rank: int, world_size: int, layout: tuple[int, int], seed_again: bool) -> dict[str, Any]:
    # As processes start that nobody has seeded: apart, and without what a test before this one has left.
    os.environ.pop("PL_GLOBAL_SEED", None)
    seed(rank)
    module, run = Module(seed_again), trainer(layout)
    run.fit(module, DataLoader(Shuffled(), batch_size=2))
    seed(rank)
    with run.strategy.process_group():
        prompt = {"input_ids": ROWS[:1], "attention_mask": torch.ones_like(ROWS[:1])}
        tokens = module.eval().network.generate(**prompt, do_sample=True, max_new_tokens=8)
    return {"drawn": module.drawn, "head": module.head[1].weight.detach(), "tokens": tokens.tolist()}


@pytest.mark.parametrize("seed_again", [False, True], ids=["never", "in a hook of some ranks"])
def test_tensor_ranks_draw_the_same_whoever_seeded_and_data_ranks_their_own(on_ranks: Any, seed_again: bool) -> None:
    found = on_ranks(train_unseeded, 4, (2, 2), seed_again, backend=None, timeout=120)
    for first, second in (found[:2], found[2:]):
        assert len(first["drawn"]) == 3 and first["drawn"] == second["drawn"]
        assert torch.equal(first["head"], second["head"]) and first["tokens"] == second["tokens"]
    assert found[0]["drawn"][0] != found[2]["drawn"][0] and found[0]["tokens"] != found[2]["tokens"]
    # A seed that the user sets on the data ranks alike is theirs alike.
    alike = [one[:3] for one in found[0]["drawn"][1:]] == [one[:3] for one in found[2]["drawn"][1:]]
    assert alike == seed_again


def worker_ranks(rank: int, world_size: int) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_SEED_WORKERS", "1")
        run = trainer((2, 2))
        run.fit(Module(), DataLoader(ROWS, batch_size=2))
        own = DataLoader(ROWS, batch_size=2, worker_init_fn=print)
        run.strategy.process_dataloader(own)
    return [run.train_dataloader.worker_init_fn.keywords["rank"], own.worker_init_fn is print]


def test_workers_of_tensor_ranks_have_the_seeds_of_their_data_rank(on_ranks: Any) -> None:
    assert on_ranks(worker_ranks, 4, backend=None) == [[0, True], [0, True], [1, True], [1, True]]


def refusals(rank: int, world_size: int) -> None:
    over_all = DataLoader(ROWS, batch_size=2, sampler=DistributedSampler(ROWS, world_size, rank, shuffle=False))
    for stage in ("train", "validate", "predict"):
        run, module = trainer((1, 2), use_distributed_sampler=False), Module()
        module.validation_step = module.predict_step = lambda batch, batch_idx: None
        call = {"train": run.fit, "validate": run.validate, "predict": run.predict}[stage]
        with pytest.raises(
            DataError,
            match=rf"Batch 0 of {stage} is not the same on the tensor ranks \[0, 1\]: the values of batch "
            rf"\(int64 \[2, 6\]\) on rank 1 are not those on rank 0\..*distributed_sampler_kwargs, here "
            rf"\{{'num_replicas': 1, 'rank': 0\}}",
        ):
            call(module, over_all)


def test_a_sampler_over_all_ranks_is_refused_with_what_differs(on_ranks: Any) -> None:
    on_ranks(refusals, 2, backend=None)


def compared(rank: int, world_size: int) -> list[int]:
    """Numbers of the batches at which a difference that begins there is seen."""
    seen = []
    for begin in (0, 1, 2, EVERY - 1, EVERY):
        ranks = TensorRanks(Layout(1, 2, 2), rank, timedelta(seconds=30))
        # Keys are numbered from one again.
        ranks._num_told = 1000 * (begin + 1)
        for number in range(EVERY + 3):
            batch = {"x": torch.tensor([rank if number >= begin else 0]), "ids": ["a", 1.0]}
            try:
                ranks.require_same_batch(batch, stage="train", loader=0, number=number)
            except DataError:
                seen.append(number)
                break
        else:
            seen.append(-1)
    # A new pass, here of one batch, is looked at from its first on; and another loader has passes of its own.
    for loader, number in ((0, 1), (1, 7)):
        with pytest.raises(DataError, match=f"Batch {number} of train{', data loader 1' if loader else ''} is"):
            ranks.require_same_batch(rank, stage="train", loader=loader, number=number)
    return seen


def kinds(rank: int, world_size: int) -> None:
    ranks = TensorRanks(Layout(1, 2, 2), rank, timedelta(seconds=1))

    def refused(first: Any, second: Any, words: str) -> None:
        with pytest.raises(DataError, match=words):
            ranks.require_same_batch(first if rank == 0 else second, stage="train", loader=0, number=0)

    x = torch.zeros(2, 3)
    refused({"x": x}, {"x": x, "y": x}, r"batch\['y'\] is float32 \[2, 3\] on rank 1 and missing on rank 0")
    refused({"x": x}, {"x": x[:1]}, r"batch\['x'\] is float32 \[1, 3\] on rank 1 and float32 \[2, 3\] on rank 0")
    refused([x], [x.double()], r"batch\[0\] is float64 \[2, 3\] on rank 1 and float32 \[2, 3\] on rank 0")
    refused(["a"], ["b"], r"the values of batch\[0\] \(str\) on rank 1 are not those on rank 0")
    refused(x.numpy(), x.numpy() + 1, r"the values of batch \(numpy float32 \[2, 3\]\) on rank 1")
    refused(x.bfloat16(), (x + 1).bfloat16(), r"the values of batch \(bfloat16")
    refused(dict.fromkeys("abcde", 0), dict.fromkeys("abcde", 1), "; and 2 more")
    same = {"b": None, "a": [x.bool(), torch.tensor(1), torch.empty(0), x.to_sparse(), object()]}
    ranks.require_same_batch(same if rank else dict(reversed(same.items())), stage="train", loader=0, number=0)
    if rank == 0:
        with pytest.raises(DataError, match=r"ranks \[1\] did not come to batch 0 of train within 1 s, as rank 0 did"):
            ranks.require_same_batch(x, stage="train", loader=0, number=0)


def test_batches_are_compared_at_a_pass_begin_and_every_so_often(on_ranks: Any) -> None:
    assert FIRST == 2
    assert on_ranks(compared, 2) == [[0, 1, EVERY, EVERY, EVERY]] * 2


def test_what_differs_in_a_batch_is_named(on_ranks: Any) -> None:
    on_ranks(kinds, 2)
