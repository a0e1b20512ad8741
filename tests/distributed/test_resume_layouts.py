"""Every layout goes on from a checkpoint of every other: five by five, each checkpoint written once.

Catches a shard that is put at another's place on the way into another layout, optimizer states that stay behind or
come to another parameter, a schedule or a position in the data that a change of layout loses, and a loss that goes on
from anywhere else than where it was. `benchmarks/resume_table.py` is what is run; it also prints the tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from benchmarks import resume_table
from benchmarks.resume_table import BOUND, LAYOUTS, SAVED_AFTER, STEPS, Result


def test_every_layout_resumes_from_every_other(on_ranks: Any, tmp_path: Path) -> None:
    result = resume_table.resume_table(on_ranks, tmp_path, "deepseek_v2", timeout=500)
    pairs = {(source, target) for source in LAYOUTS for target in LAYOUTS}
    assert len(pairs) == 25 and result.state.keys() == result.loss.keys() == pairs
    # Weight, both moments and the step of each parameter.
    assert result.tensors % 4 == 0 and result.tensors > 80
    assert set(result.state.values()) == {0.0}
    # Other additions in other layouts, of one process none; nothing at all would say that nothing was compared.
    assert 0 < max(result.loss.values()) <= BOUND and result.loss[(1, 1, 1), (1, 1, 1)] == 0
    assert result.holds


class SaveAtTheEnd(Callback):
    """Saves where ModelCheckpoint saves by default: at the end of an epoch, also one that is cut short."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.global_step == SAVED_AFTER:
            trainer.save_checkpoint(self.path)


def cut_short(rank: int, world: int, folder: str, layout: Any) -> list[dict[int, float]]:
    def losses(steps: int, **more: Any) -> dict[int, float]:
        return resume_table.fit(folder, "llama", layout, steps, **more).losses

    straight = losses(STEPS)
    within = f"{folder}/within.ckpt"
    module = resume_table.fit(folder, "llama", layout, SAVED_AFTER, save=SaveAtTheEnd(within))
    module.trainer.save_checkpoint(f"{folder}/after.ckpt")
    return [straight, losses(STEPS, checkpoint=within), losses(STEPS, checkpoint=f"{folder}/after.ckpt")]


def test_an_epoch_that_a_limit_of_steps_cut_short_goes_on_where_it_was(on_ranks: Any, tmp_path: Path) -> None:
    """A user who saves when `fit` has returned, and trains longer, gets the run that was never cut."""
    resume_table.write_text(tmp_path)
    straight, *resumed = on_ranks(cut_short, 1, str(tmp_path), (1, 1, 1), timeout=300)[0]
    for losses in resumed:
        assert losses == {step: straight[step] for step in range(SAVED_AFTER, STEPS)}


def test_any_difference_shows() -> None:
    one = torch.tensor([1.0, -0.0])
    assert resume_table._difference(one.clone(), one) == 0
    assert resume_table._difference(one + torch.tensor([1e-7, 0]), one) > 0
    for other in (None, one.double(), one[:1], torch.tensor([1.0, float("nan")])):
        assert resume_table._difference(other, one) == float("inf")
    pair = (LAYOUTS[0], LAYOUTS[1])
    for state, loss in ((1e-300, 0.0), (0.0, 2 * BOUND), (0.0, float("nan"))):
        assert not Result("any", state={pair: state}, loss={pair: loss}).holds
    assert Result("any", state={pair: 0.0}, loss={pair: BOUND}).holds
