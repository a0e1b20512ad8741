"""Every layout goes on from a checkpoint of every other: what comes back, and what is computed from there.

    python benchmarks/resume_table.py --json benchmarks/results/resume_table_cpu_2026-11.json
    python benchmarks/resume_table.py --family deepseek_v2 --family mixtral

Each source layout trains a few steps in float64 on packed text and saves in the middle of an epoch; each target layout
loads each of those checkpoints through the trainer and goes on over the epoch's end. Two tables per family: the worst
difference of any weight and any optimizer state, gathered after loading, to what the source held when it saved (bit
for bit, so it must be 0), and the worst relative difference of a later loss to that of one process that was never
stopped (1e-10 at most). Exit code 1 beyond that. The global batch is the same in every layout.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch.distributed.tensor import DTensor

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.tools.testing.models import tiny_config
from lightning_npu_tp.tools.testing.ranks import RankPool
from lit_models.causal_lm import LitCausalLM
from lit_models.data import TextDataModule

Sizes = tuple[int, int, int]
# data, tensor, expert
LAYOUTS: tuple[Sizes, ...] = ((1, 1, 1), (1, 2, 2), (1, 4, 4), (2, 1, 2), (2, 2, 4))
FAMILIES = ("deepseek_v2", "mixtral")
BOUND = 1e-10
# Sequences of a step; an epoch has 5 steps. Saved inside the first epoch, gone on into the second.
GLOBAL_BATCH, SAVED_AFTER, STEPS = 4, 3, 7
_SEQUENCES, _LENGTH = 22, 16


def gathered(module: LitCausalLM) -> dict[str, torch.Tensor]:
    """Every weight and every optimizer state, whole, by name; on every rank."""
    states = module.trainer.optimizers[0].state
    found = {}
    for name, parameter in module.named_parameters():
        parts = {name: parameter.detach()} | {f"{key} of {name}": value for key, value in states[parameter].items()}
        for what, value in parts.items():
            found[what] = (value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)).clone()
    return found


class Recorded(LitCausalLM):
    """Keeps the loss of each step, and all state at the beginning and at the end."""

    def __init__(self, family: str) -> None:
        config = tiny_config(family, vocab_size=264, num_hidden_layers=2).to_dict()
        config.pop("model_type")
        super().__init__(
            architecture=family,
            config=config,
            optimizer=partial(torch.optim.AdamW, lr=1e-2),
            scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
        )
        self.losses: dict[int, float] = {}
        self.at_start: dict[str, torch.Tensor] = {}

    def on_train_start(self) -> None:
        if self.trainer.global_step:
            self.at_start = gathered(self)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.losses[self.trainer.global_step] = self._token_mean.loss().item()
        super().on_before_optimizer_step(optimizer)


class SaveInTheMiddle(Callback):
    """Saves after a step, as a checkpoint callback does, and keeps what was saved."""

    def __init__(self, path: str) -> None:
        self.path, self.saved = path, {}

    def on_train_batch_end(self, trainer: Trainer, module: Any, *arguments: Any) -> None:
        if trainer.global_step == SAVED_AFTER:
            self.saved = gathered(module)
            trainer.save_checkpoint(self.path)


def fit(
    folder: str, family: str, layout: Sizes, steps: int, *, save: Callback | None = None, checkpoint: str | None = None
) -> Recorded:
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "torch.distributed.tensor._redistribute"):
        logging.getLogger(name).setLevel(logging.ERROR)
    seed_everything(1, verbose=False)
    names = ("data_parallel_size", "tensor_parallel_size", "expert_parallel_size")
    trainer = Trainer(
        accelerator="cpu",
        devices=layout[0] * layout[1],
        strategy=NPUTensorParallelStrategy(init_seed=0, **dict(zip(names, layout, strict=True))),
        precision="64-true",
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=0.5,
        callbacks=[] if save is None else [save],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    data = TextDataModule(
        source="text",
        paths=f"{folder}/text.txt",
        sequence_length=_LENGTH,
        batch_size=GLOBAL_BATCH // layout[0],
        val_fraction=0.0,
    )
    module = Recorded(family)
    trainer.fit(module, data, ckpt_path=checkpoint)
    return module


def place(folder: str, layout: Sizes) -> str:
    return f"{folder}/" + "_".join(map(str, layout))


def save_each(rank: int, world: int, folder: str, family: str, layouts: Sequence[Sizes]) -> dict[int, float]:
    """Train and save in each layout; returns the losses of a run of one process that nobody stopped, if it is here."""
    straight = {}
    for layout in layouts:
        save = SaveInTheMiddle(f"{place(folder, layout)}.ckpt")
        module = fit(folder, family, layout, STEPS if world == 1 else SAVED_AFTER, save=save)
        if rank == 0:
            torch.save(save.saved, f"{place(folder, layout)}.pt")
        straight = module.losses if world == 1 else {}
    return straight


@dataclass
class Cell:
    """One source into one target, on one rank.

    difference: worst of any tensor, 0 only if all are bit for bit equal. tensors: how many were compared.
    """

    difference: float
    tensors: int
    losses: dict[int, float]


def load_each(
    rank: int, world: int, folder: str, family: str, layouts: Sequence[Sizes], sources: Sequence[Sizes]
) -> dict[tuple[Sizes, Sizes], Cell]:
    """Go on from each source's checkpoint in each of these layouts."""
    found = {}
    for target in layouts:
        for source in sources:
            module = fit(folder, family, target, STEPS, checkpoint=f"{place(folder, source)}.ckpt")
            wanted = torch.load(f"{place(folder, source)}.pt", weights_only=True)
            worst = max(_difference(module.at_start.get(name), value) for name, value in wanted.items())
            if module.at_start.keys() != wanted.keys():
                worst = math.inf
            found[source, target] = Cell(worst, len(wanted), module.losses)
    return found


def _difference(actual: torch.Tensor | None, wanted: torch.Tensor) -> float:
    if actual is None or actual.shape != wanted.shape or actual.dtype != wanted.dtype:
        return math.inf
    if torch.equal(actual, wanted):
        return 0.0
    off = (actual.double() - wanted.double()).abs().max().item()
    # Unequal, yet no distance: NaN, or a zero of the other sign.
    return off if off > 0 else math.inf


@dataclass
class Result:
    """Both tables of a family, by (source, target)."""

    family: str
    tensors: int = 0
    state: dict[tuple[Sizes, Sizes], float] = field(default_factory=dict)
    loss: dict[tuple[Sizes, Sizes], float] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether everything came back bit for bit and went on within the bound."""
        return all(value == 0 for value in self.state.values()) and all(v <= BOUND for v in self.loss.values())


def write_text(folder: Path) -> None:
    """What is trained on: one token a byte, and the document's end."""
    words = "".join(f"{number} sheep jumped. " for number in range(999))
    (folder / "text.txt").write_text(words[: _SEQUENCES * _LENGTH])


def resume_table(
    run: Callable[..., list[Any]], folder: Path, family: str, layouts: Sequence[Sizes] = LAYOUTS, timeout: float = 600.0
) -> Result:
    """Fill the tables; `run(function, world, *arguments, timeout=, backend=None)` starts ranks, which may be kept."""
    write_text(folder)
    worlds = {
        data * tensor: [sizes for sizes in layouts if sizes[0] * sizes[1] == data * tensor]
        for data, tensor, _ in layouts
    }
    straight: dict[int, float] = {}
    for world, own in worlds.items():
        straight |= run(save_each, world, str(folder), family, own, timeout=timeout, backend=None)[0]
    result = Result(family)
    for world, own in worlds.items():
        for cells in run(load_each, world, str(folder), family, own, layouts, timeout=timeout, backend=None):
            for pair, cell in cells.items():
                late = {step: loss for step, loss in straight.items() if step >= SAVED_AFTER}
                off = [
                    abs(cell.losses[step] - loss) / abs(loss) if step in cell.losses else math.inf
                    for step, loss in late.items()
                ]
                if cell.losses.keys() != late.keys():
                    off.append(math.inf)
                result.tensors = cell.tensors
                result.state[pair] = max(result.state.get(pair, 0.0), cell.difference)
                result.loss[pair] = max(result.loss.get(pair, 0.0), *off)
    return result


def printed(result: Result, values: dict[tuple[Sizes, Sizes], float], title: str) -> Table:
    table = Table(title=f"{result.family}: {title}", title_justify="left")
    layouts = list(dict.fromkeys(source for source, _ in values))
    table.add_column("saved in \\ goes on in")
    for target in layouts:
        table.add_column(str(target), justify="right")
    for source in layouts:
        table.add_row(
            str(source), *(f"{values[source, target]:.1e}" if values[source, target] else "0" for target in layouts)
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", help="of tiny_config; may be repeated; deepseek_v2 and mixtral")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds of one set of runs")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    pools: dict[int, RankPool] = {}

    def run(function: Callable[..., Any], world: int, *arguments: Any, **options: Any) -> list[Any]:
        return pools.setdefault(world, RankPool(world)).run(function, *arguments, **options)

    results = []
    console = Console(width=110)
    try:
        for family in given.family or FAMILIES:
            with tempfile.TemporaryDirectory() as folder:
                result = resume_table(run, Path(folder), family, timeout=given.timeout)
            results.append(result)
            title = f"worst difference of {result.tensors} weights and optimizer states, gathered"
            console.print(printed(result, result.state, title))
            console.print(printed(result, result.loss, "worst relative difference of a later loss to one process's"))
    finally:
        for pool in pools.values():
            pool.close()
    told = {
        "families": {
            result.family: {
                "holds": result.holds,
                "tensors": result.tensors,
                "worst_gathered_difference": max(result.state.values()),
                "worst_relative_loss_difference": max(result.loss.values()),
                "gathered_difference": _plain(result.state),
                "relative_loss_difference": _plain(result.loss),
            }
            for result in results
        },
        "bound_of_losses": BOUND,
        "saved_after_steps": SAVED_AFTER,
        "steps": STEPS,
        "date": str(date.today()),
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, torch {torch.__version__}",
        "command": "python benchmarks/resume_table.py " + " ".join(sys.argv[1:]),
    }
    if given.json:
        given.json.write_text(json.dumps(told, indent=2) + "\n")
    holds = all(result.holds for result in results)
    print("every layout resumes from every other" if holds else "a layout does NOT resume as it should: see the tables")
    sys.exit(0 if holds else 1)


def _plain(values: dict[tuple[Sizes, Sizes], float]) -> dict[str, float | str]:
    return {f"{s} -> {t}": value if math.isfinite(value) else str(value) for (s, t), value in values.items()}


if __name__ == "__main__":
    main()
