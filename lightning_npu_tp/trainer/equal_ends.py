"""Ranks that run out of batches at different times are told so, instead of waiting for each other for ever.

Loaders that know their length are compared before the first batch. Of the others, iterable data sets, nobody knows
before they end; so the ranks tell each other with every batch whether it is the last, in a collective on the host.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.data import has_iterable_dataset, sized_len
from lightning.pytorch import Trainer

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.launch.same_settings import require_equal_batches, require_same_end
from lightning_npu_tp.parallel.layout import Layout


def before_batches(trainer: Trainer, layout: Layout, options: Options) -> None:
    """Compare the ranks' numbers of batches, at the start of an evaluation or of an epoch of training.

    Raises the same DataError on every rank where some have more than others.
    """
    loop = _loop(trainer)
    if not _meet_in_every_batch(trainer, layout, options):
        return
    if _may_end_any_time(loop):
        _compare(trainer, layout, loop, ended=loop._data_fetcher.done, batches=0)
    elif not trainer.training:
        for batches in loop.max_batches:
            require_equal_batches(batches, layout=layout, stage=_stage(trainer))


def at_batch(trainer: Trainer, layout: Layout, options: Options, loader: int) -> None:
    """Compare, once a batch has been fetched, whether it was the last; only where that is not known before.

    loader: the number of the data loader that it came from.
    Raises the same DataError on every rank where some have more than others.
    """
    loop = _loop(trainer)
    if not _may_end_any_time(loop) or not _meet_in_every_batch(trainer, layout, options):
        return
    progress = (loop.epoch_loop if trainer.training else loop).batch_progress
    batches = progress.current.ready + 1
    # Between two loaders Lightning reduces what the first has logged; at the next batch it would be too late.
    fetched = getattr(loop._data_fetcher, "batches", None)
    following = fetched[0][2] if fetched else loader
    limited = trainer.training and batches >= trainer.num_training_batches
    _compare(trainer, layout, loop, ended=progress.is_last_batch or limited, batches=batches, loader=following)


def _compare(trainer: Trainer, layout: Layout, loop: Any, *, ended: bool, batches: int, loader: int = 0) -> None:
    require_same_end(ended, batches=batches, loader=loader, layout=layout, stage=_stage(trainer))


def _loop(trainer: Trainer) -> Any:
    return trainer._active_loop


def _stage(trainer: Trainer) -> str:
    assert trainer.state.stage is not None
    return trainer.state.stage.dataloader_prefix or "val"


def _meet_in_every_batch(trainer: Trainer, layout: Layout, options: Options) -> bool:
    """Whether a rank without a batch would be missed: replicas evaluate each on its own."""
    if not dist.is_initialized() or layout.world == 1:
        return False
    return trainer.training or layout.data == 1 or options.data_parallel == "shard" or layout.expert > layout.tensor


def _may_end_any_time(loop: Any) -> bool:
    loaders = [] if loop is None or loop._combined_loader is None else loop._combined_loader.flattened
    return any(sized_len(loader) is None or has_iterable_dataset(loader) for loader in loaders)
