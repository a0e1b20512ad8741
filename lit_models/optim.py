"""Parameter groups for weight decay, and learning-rate schedules as LambdaLR.

Plain functions for plain torch optimizers: a config names `torch.optim.AdamW` and one of these
schedules, and the LightningModule joins them. No trainer and no Hydra here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_npu_tp import ConfigError

NO_WEIGHT_DECAY = ("*norm*", "*.bias")


def weight_decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], no_weight_decay: Sequence[str] = NO_WEIGHT_DECAY
) -> list[dict[str, Any]]:
    """Two parameter groups: the optimizer's own weight decay, and none.

    no_weight_decay: patterns with `*` over parameter names. By name and not by number of dimensions:
    a norm's weight may be sharded or stacked, its name stays. Frozen parameters are left out.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            is_exempt = any(fnmatchcase(name, pattern) for pattern in no_weight_decay)
            (exempt if is_exempt else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def constant(optimizer: Optimizer, *, warmup_steps: int = 0) -> LambdaLR:
    """The optimizer's learning rate, after a linear warm-up of `warmup_steps` optimizer steps."""
    return LambdaLR(optimizer, _with_warmup(lambda step: 1.0, warmup_steps))


def cosine(optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0, min_lr_ratio: float = 0.1) -> LambdaLR:
    """Linear warm-up, then half a cosine from the optimizer's learning rate to `min_lr_ratio` of it.

    total_steps, warmup_steps: optimizer steps; the last of `total_steps` runs at `min_lr_ratio`, and
    so do steps after it. A run that is shorter than its warm-up, as a quick trial may be, ends within it.
    """
    if not 0 <= min_lr_ratio <= 1:
        raise ConfigError(f"scheduler.min_lr_ratio={min_lr_ratio} is not in [0, 1]. Set it to a share such as 0.1.")

    def half_cosine(step: int) -> float:
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
        return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, _with_warmup(half_cosine, warmup_steps))


def _with_warmup(after: Callable[[int], float], warmup_steps: int) -> Callable[[int], float]:
    if warmup_steps < 0:
        raise ConfigError(f"scheduler.warmup_steps={warmup_steps} is negative. Set it to 0 or more optimizer steps.")
    # Step 0 already learns: the warm-up counts from 1.
    return lambda step: (step + 1) / (warmup_steps + 1) if step < warmup_steps else after(step)
