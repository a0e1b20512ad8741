"""All ranks start with the same settings, or all of them end with one error that names the difference.

A rank with another setting usually hangs in a collective hours later, or trains another model without a word. Here
each rank's settings are compared with rank 0's before anything is built: hashes travel first, the settings
themselves only if those differ. What a setting means is unknown here; values are compared as they print.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import re
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lightning_npu_tp.errors import ConfigError, DataError
from lightning_npu_tp.launch.hosts import ranks_in_words

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_npu_tp.parallel.layout import Layout

_MOST_KEYS = 5
_MOST_CHARACTERS = 80
_STAGES = {"train": "training", "val": "validation", "test": "test", "predict": "prediction"}
# Of the Trainer's own arguments, by the attribute that keeps them.
_TRAINER_SETTINGS = (
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "max_steps",
    "max_epochs",
    "min_steps",
    "min_epochs",
    "val_check_interval",
    "check_val_every_n_epoch",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "limit_predict_batches",
    "overfit_batches",
    "num_sanity_val_steps",
    "reload_dataloaders_every_n_epochs",
)


def require_agreement(settings: Mapping[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Compare this rank's settings with those of the group's first rank.

    settings: may be nested; keys become "trainer.max_steps". Values are compared by their repr, without addresses.
    Collective over `group` (None: all ranks); does nothing without a process group.
    Raises the same ConfigError on every rank, with up to five keys and both values of each.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    flat = flatten(settings)
    digest = hashlib.sha256(repr(sorted(flat.items())).encode()).hexdigest()
    if len(set(_gather(digest, group))) == 1:
        return
    everyone = _gather((dist.get_rank(), socket.gethostname(), flat), group)
    _, _, first = everyone[0]
    first_rank = everyone[0][0]
    lines: dict[str, str] = {}
    for rank, host, other in everyone[1:]:
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key) and key not in lines:
                lines[key] = (
                    f"{key} is {_shown(other.get(key))} on rank {rank} (host {host}) but {_shown(first.get(key))} on "
                    f"rank {first_rank}"
                )
    more = f"; and {len(lines) - _MOST_KEYS} more" if len(lines) > _MOST_KEYS else ""
    raise ConfigError(
        f"{'; '.join(list(lines.values())[:_MOST_KEYS])}{more}. Give every rank the same command line, environment and "
        f"config files."
    )


def require_equal_batches(
    batches: float,
    *,
    layout: Layout,
    batches_needed: float = math.inf,
    group: dist.ProcessGroup | None = None,
    stage: str = "train",
) -> None:
    """Refuse data ranks that would run out of batches at different times: the others would wait for ever.

    batches:        of one epoch on this rank; math.inf where the loader has no length, which is not compared.
    batches_needed: after which the run ends by itself; ranks that all have as many may differ.
    stage:          whose batches, as Lightning names its loaders: train, val, test or predict.
    Collective over `group` (None: all ranks). Raises the same DataError on every rank.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    by_rank = _gather(batches, group)
    if len(set(by_rank)) == 1 or min(by_rank) >= batches_needed:
        return
    steps = " or trainer.max_steps" if stage == "train" else ""
    raise DataError(
        f"The ranks have different numbers of {_STAGES[stage]} batches: {_by_count(by_rank, layout)}. The longer ones "
        f"would wait for ever in a collective. Divide the data evenly, drop the rest (drop_last=True), let Lightning's "
        f"distributed sampler do it, or set trainer.limit_{stage}_batches={int(min(by_rank))}{steps}."
    )


def require_same_end(ended: bool, *, batches: int, loader: int, layout: Layout, stage: str) -> None:
    """Refuse data that ends on some ranks only, or from which ranks go on to the next loader at different times.

    ended:   whether this rank has none after these batches.
    batches: of this epoch so far.
    loader:  number of the loader that the next one comes from.
    stage:   as for `require_equal_batches`.
    Collective over all ranks. Raises the same DataError on every rank.
    """
    by_rank = _gather((ended, loader), None)
    if len(set(by_rank)) == 1:
        return
    least = [has_ended for has_ended, _ in by_rank]
    if not any(least):
        # With several loaders, some ranks go on to the next one.
        least = [number == max(number for _, number in by_rank) for _, number in by_rank]
    short = [rank for rank, is_short in enumerate(least) if is_short]
    raise DataError(
        f"The {_STAGES[stage]} data ends after {batches} batches on {ranks_in_words(short)} (data "
        f"{ranks_in_words(_data_ranks(short, layout))}), and others have more. They would wait for ever in a "
        f"collective. Let the iterable data set give every rank as many batches, or set "
        f"trainer.limit_{stage}_batches={batches}."
    )


def run_settings(trainer: Trainer, module: LightningModule, strategy: Any) -> dict[str, Any]:
    """What must agree between the ranks of a run: layout, precision, trainer, hyperparameters, model config, seed.

    Nothing here differs between ranks on purpose: no paths, no ranks, no devices.
    """
    settings: dict[str, Any] = {
        "strategy": vars(strategy.layout) | vars(strategy.options) | vars(strategy.checkpoint_settings),
        "trainer": {name: getattr(trainer, name) for name in _TRAINER_SETTINGS if hasattr(trainer, name)},
        "module": {"class": type(module).__qualname__, **dict(module.hparams)},
        "seed": os.environ.get("PL_GLOBAL_SEED", "not set"),
        "torch": torch.__version__,
    }
    settings["trainer"]["precision"] = trainer.precision
    settings["trainer"]["stage"] = str(trainer.state.fn)
    data = getattr(trainer, "datamodule", None)
    if data is not None:
        settings["data"] = {"class": type(data).__qualname__, **_numbers_given(data), **dict(data.hparams)}
    config = getattr(module, "model_config", None) or getattr(getattr(module, "model", None), "config", None)
    if config is not None and hasattr(config, "to_dict"):
        settings["model"] = {"config": config.to_dict()}
    return settings


def _numbers_given(data: Any) -> dict[str, Any]:
    """Constructor arguments that a data module without `save_hyperparameters` keeps under their own names.

    Numbers and switches only: paths may differ between machines, and so may how data is fetched.
    """
    names = inspect.signature(type(data)).parameters.keys() - {"num_workers", "pin_memory"}
    values = {name: vars(data)[name] for name in names if name in vars(data)}
    return {name: value for name, value in values.items() if value is None or isinstance(value, int | float)}


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted key -> how the value prints, without the addresses of objects."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    return flat


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _shown(text: str | None) -> str:
    if text is None:
        return "not set"
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


def _count_in_words(count: float) -> str:
    return "no known number" if math.isinf(count) else str(int(count))


def _by_count(by_rank: list[float], layout: Layout) -> str:
    ranks_of: dict[float, list[int]] = {}
    for rank, count in enumerate(by_rank):
        ranks_of.setdefault(count, []).append(rank)
    return "; ".join(
        f"{_count_in_words(count)} on {ranks_in_words(ranks)} (data {ranks_in_words(_data_ranks(ranks, layout))})"
        for count, ranks in sorted(ranks_of.items())
    )


def _data_ranks(ranks: list[int], layout: Layout) -> list[int]:
    return sorted({rank // layout.tensor for rank in ranks})
