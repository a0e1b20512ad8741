"""Where in the data a run stands, as two numbers that no layout changes: the epoch and the samples taken of its order.

The samples are those of all data ranks together, so every rank stores the same state and a run goes on with other
data ranks, another batch size or other loader processes. Beside them the state says over which data they were
counted: a position in other data means nothing, and a run that resumes there is told what differs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_npu_tp import DataError
from lit_models.data.order import EpochSampler

_KEYS = {"epoch", "samples", "samples_per_step", "ended", "identity"}
# torchdata asks its processes for a state after so many batches. Ours needs none: the place in the order is enough.
_NEVER = 2**62


class PositionedLoader(StatefulDataLoader):
    """A StatefulDataLoader whose state is the global position {epoch, samples, …} and holds plain numbers only.

    identity:   what the position was counted over; plain values by name.
    on_changed: "error" or "restart" (the epoch begins anew, with a warning) where a state's identity differs.
    on_resume:  called with the number of this rank's batches that lie before the position, where the state counts
                them otherwise (another layout, or the epoch begins anew).

    The order is begun at the first batch and not by `iter`, since Lightning calls `iter`, then loads states and sets
    the epoch. `len` is that of a whole epoch: Lightning counts the batches before a resume as done.
    """

    def __init__(
        self,
        dataset: Any,
        *args: Any,
        identity: Mapping[str, Any] | None = None,
        on_changed: str = "error",
        on_resume: Callable[[int], None] | None = None,
        **kwargs: Any,
    ) -> None:
        with warnings.catch_warnings():
            # torchdata 0.11, the last of its kind, calls a function that torch 2.13 deprecates.
            warnings.filterwarnings("ignore", ".*set_vital", UserWarning)
            # A generator of its own: torch's loaders draw a seed from everybody's each time they begin, so a run that
            # was resumed, and began once more, would draw other numbers.
            settings = {"snapshot_every_n_steps": _NEVER, "generator": torch.Generator(), **kwargs}
            super().__init__(dataset, *args, **settings)
        self.identity = dict(identity or {})
        self.on_changed = on_changed
        self.on_resume = on_resume
        self._epoch, self._samples = 0, 0
        self._resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._batches() if isinstance(self.sampler, EpochSampler) else super().__iter__()

    def _batches(self) -> Iterator[Any]:
        sampler = self.sampler
        epoch, samples = self._resume or (sampler.epoch, 0)
        self._resume = None
        # Lightning's word counts: a run stopped at its epoch's last batch goes on with the next epoch.
        self._epoch, self._samples = sampler.epoch, samples if epoch == sampler.epoch else 0
        sampler.start = self._samples
        batches = super().__iter__()
        sampler.start = 0
        for batch in batches:
            self._samples += sampler.samples_per_step
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the batches that were handed out; the same on every rank."""
        if not isinstance(self.sampler, EpochSampler):
            return {}
        epoch, samples = self._resume or (self._epoch, self._samples)
        per_step = self.sampler.samples_per_step
        return {
            "epoch": epoch,
            "samples": samples,
            "samples_per_step": per_step,
            "ended": samples + per_step > len(self.dataset),
            "identity": dict(self.identity),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of any layout.

        Raises DataError where it was counted over other data, naming what differs.
        """
        if not state_dict or not isinstance(self.sampler, EpochSampler):
            return
        if set(state_dict) != _KEYS:
            problem = "The checkpoint's data position was written by another kind of loader"
        else:
            problem = _difference(state_dict["identity"], self.identity)
        if problem:
            repair = "Resume with the data that the checkpoint was trained on, or set data.on_changed=restart to begin"
            if self.on_changed != "restart":
                raise DataError(f"{problem}. {repair} its epoch anew with the data as it is now.")
            rank_zero_warn(f"{problem}. The epoch begins anew with the data as it is now (data.on_changed=restart).")
            self._begin_at(self.sampler.epoch if "epoch" not in state_dict else state_dict["epoch"], 0, 0)
            return
        samples = state_dict["samples"]
        batches = min(-(-samples // self.sampler.samples_per_step), len(self))
        self._begin_at(
            state_dict["epoch"],
            # An old layout's rest of an epoch, smaller than its step, is left out in the new one too.
            len(self.dataset) if state_dict["ended"] else samples,
            len(self) if state_dict["ended"] else batches,
            tell=state_dict["samples_per_step"] != self.sampler.samples_per_step,
        )

    def _begin_at(self, epoch: int, samples: int, batches: int, *, tell: bool = True) -> None:
        self.sampler.epoch = epoch
        self._resume = (epoch, samples)
        if tell and self.on_resume is not None:
            self.on_resume(batches)


def _difference(stored: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """What differs, in words; "" where nothing does. What only explains a difference does not make one."""
    if stored.get("content") == current.get("content"):
        # The same tokens from files of another name or folder are the same data.
        explains = {"files", "tokenizer"}
    else:
        explains = set()
    changes = [
        f"{name} was {stored.get(name)!r} and is {current.get(name)!r}"
        for name in sorted((stored.keys() | current.keys()) - explains)
        if stored.get(name) != current.get(name)
    ]
    return f"The checkpoint's data position was counted over other data: {'; '.join(changes)}" if changes else ""


def count_batches_as_done(trainer: Trainer, batches: int) -> None:
    """Set Lightning's batch counters of the current epoch, which a checkpoint holds in the old layout's batches."""
    current = trainer.fit_loop.epoch_loop.batch_progress.current
    ahead = batches - current.ready
    for name in ("ready", "started", "processed", "completed"):
        # Their differences say at which hook the checkpoint was written, and stay: -1 completed of 0 is no mistake.
        setattr(current, name, getattr(current, name) + ahead)


def load_late_states(trainer: Trainer) -> None:
    """Load loader states that Lightning has put by and then forgets.

    It does where the loaders exist before the loops' state is restored, which `trainer.estimated_stepping_batches`
    in `configure_optimizers` brings about.
    """
    trainer.fit_loop._load_combined_loader_states()
