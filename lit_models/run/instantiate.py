"""Build the objects that a config names, and say which key is wrong when one cannot be built.

Stricter than Hydra alone: a node that should be built and names no `_target_` is an error instead of a
dictionary that nobody notices; `null` is the one way to say "not wanted". Arguments that a target
refuses come out as one sentence with the key.
"""

from __future__ import annotations

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from lightning_npu_tp import ConfigError, LightningNPUTPError


def build(config: DictConfig, key: str, **arguments: Any) -> Any:
    """The object that `config[key]` describes, or None where it is null.

    key:       dotted path, e.g. "callbacks.loss_curve".
    arguments: objects to hand to the target beside the config's own values.

    Raises ConfigError for a node without `_target_`, a target that cannot be found and arguments that
    it refuses. Errors of this package and of Lightning pass through as they are.
    """
    node = OmegaConf.select(config, key)
    if node is None:
        return None
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise ConfigError(
            f"{key} should be built, but it has no _target_ (its value: {_short(node)}). Name the class in "
            f"{key}._target_, or set {key}=null to go without it."
        )
    try:
        # Plain lists and dicts: a config's own kind would end up in hyperparameters and checkpoints.
        return instantiate(node, **arguments, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, LightningNPUTPError | MisconfigurationException):
            raise cause from None
        raise ConfigError(f"{key} ({node._target_}) cannot be built: {cause or error}") from error


def build_each(config: DictConfig, key: str) -> list[Any]:
    """The objects of a group of named nodes, in order; nodes that are null, or build None, are left out."""
    nodes = OmegaConf.select(config, key)
    if nodes is None:
        return []
    if not isinstance(nodes, DictConfig) or "_target_" in nodes:
        raise ConfigError(f"{key} should be a group of named nodes, each with a _target_, but it is {_short(nodes)}.")
    built = [build(config, f"{key}.{name!s}") for name in nodes]
    return [item for item in built if item is not None]


def _short(node: Any) -> str:
    text = str(OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node)
    return text if len(text) <= 80 else f"{text[:77]}..."
