"""The strategy's arguments about checkpoints, checked, and those that it once had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_npu_tp.errors import ConfigError

OnSaveError = Literal["stop", "continue"]


@dataclass(frozen=True)
class CheckpointSettings:
    """The strategy's arguments about checkpoints; see there.

    Raises ConfigError for an `on_save_error` that does not exist and a time that is none.
    """

    trusted: bool | None = None
    async_save: bool = False
    on_save_error: OnSaveError = "stop"
    verify: bool = True
    resume_weights_only: bool = False
    allow_other_tokenizer: bool = False
    save_on_sigterm: bool = True
    sigterm_grace_s: float = 60.0

    def __post_init__(self) -> None:
        if self.on_save_error not in get_args(OnSaveError):
            raise ConfigError(
                f"on_save_error={self.on_save_error!r} does not exist. Set strategy.on_save_error to stop or continue."
            )
        if not self.sigterm_grace_s > 0:
            raise ConfigError(
                f"sigterm_grace_s={self.sigterm_grace_s} is not a positive number of seconds. Set "
                f"strategy.sigterm_grace_s, or strategy.save_on_sigterm=false."
            )


def refuse_removed(arguments: Mapping[str, object]) -> None:
    """Raise ConfigError for an argument that the strategy once had, TypeError for another that it has not."""
    for name in arguments:
        if name == "save_distributed_checkpoint":
            raise ConfigError(
                "strategy.save_distributed_checkpoint no longer exists: a checkpoint is always a folder. Leave it out; "
                "`python -m lightning.pytorch.utilities.consolidate_checkpoint CKPT` makes one file of a folder."
            )
        raise TypeError(f"NPUTensorParallelStrategy has no argument {name!r}.")
