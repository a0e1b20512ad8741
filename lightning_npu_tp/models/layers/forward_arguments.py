"""What transformers' forward takes beside its tensors: what to show of the inside, which positions, further keywords.

transformers hands keywords on from module to module and the last one swallows what nobody has read. Here each is
honoured, handed to who reads it, or refused with its name. Nothing here computes or knows a model.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_npu_tp.errors import ConfigError

Reader = Callable[..., Any]
# The switches output_… of transformers, and the names of their results.
_SHOWABLE = ("hidden_states", "attentions", "router_logits")
# They say where packed documents begin, to attention functions that take lengths; position_ids say it to all.
_DOCUMENT_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_OWN_PACKAGES = ("transformers", "torch", "lightning_npu_tp")
# Tables of hooks that a call of a module runs.
_HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks") and "state_dict" not in name]


def take_shown(config: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """Take the switches output_… out of a forward's keywords; None means what the config says.

    Returns those that are on, by the name of what they show; the value of hidden_states may choose layers.
    """
    asked = {}
    for name in _SHOWABLE:
        value = keywords.pop(f"output_{name}", None)
        asked[name] = getattr(config, f"output_{name}", False) if value is None else value
    return {name: value for name, value in asked.items() if value}


def choose_states(states: Sequence[Tensor], which: bool | int | Sequence[int]) -> tuple[Tensor | None, ...]:
    """The hidden states that `output_hidden_states` asks for: True for all, or indices; None in the others' places."""
    if isinstance(which, bool):
        return tuple(states)
    indices = [which] if isinstance(which, int) else which
    kept = {index % len(states) for index in indices if -len(states) <= index < len(states)}
    return tuple(state if index in kept else None for index, state in enumerate(states))


def keep_positions(hidden_BSD: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions whose logits are wanted, as transformers reads `logits_to_keep`.

    An int: the last so many, 0 for all. A tensor: positions [P] for all sequences, int64 [B, P] for each, or bool
    [B, S]. Returns [B, P, D], or [N, D] for a bool.
    """
    if isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim == 2:
        if logits_to_keep.dtype == torch.bool:
            return hidden_BSD[logits_to_keep]
        return torch.take_along_dim(hidden_BSD, logits_to_keep[..., None], dim=1)
    # slice(-0, None) is everything, which is what 0 means to transformers.
    return hidden_BSD[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


def read_by(readers: Iterable[Reader], keywords: Mapping[str, Any], others: Iterable[Reader] = ()) -> dict[str, Any]:
    """The keywords that one of the functions takes: by name, or with ** if neither they nor the others name it."""
    if not keywords:
        return {}
    readers = list(readers)
    named = {name for reader in (*readers, *others) for name in inspect.signature(reader).parameters}
    return {
        name: value
        for name, value in keywords.items()
        if any(_takes(reader, name, by_name=name in named) for reader in readers)
    }


def refuse_unread(
    model: nn.Module, keywords: Mapping[str, Any], readers: Iterable[Reader], *, position_ids: Tensor | None
) -> dict[str, Any]:
    """The keywords that one of `readers` takes, if these are all but those that say nothing.

    model:        whose forward got them, for the message and for its arguments' names.
    position_ids: that came with them.
    Raises ConfigError for a keyword that nobody would read.
    """
    keywords = {name: value for name, value in keywords.items() if value is not None}
    if keywords.pop("is_causal", True) is False:
        raise ConfigError(
            "is_causal=False is not supported: every layer attends to earlier positions only. Leave is_causal out, or "
            "pass a 4-D attention_mask, bool [batch, 1, length, length]."
        )
    lengths = [name for name in _DOCUMENT_LENGTHS if keywords.pop(name, None) is not None]
    if lengths and position_ids is None:
        raise ConfigError(
            f"{', '.join(lengths)} without position_ids would not separate the documents. Pass position_ids that begin "
            f"anew with each document (DataCollatorWithFlattening gives them with return_position_ids=True)."
        )
    read = read_by(readers, keywords)
    for name in sorted(keywords.keys() - read.keys()):
        near = difflib.get_close_matches(name, inspect.signature(model.forward).parameters, n=1)
        raise ConfigError(
            f"{type(model).__name__} got the argument {name!r}, which nothing in it reads. "
            f"{f'Did you mean {near[0]}?' if near else 'Leave it out of the call.'}"
        )
    return read


def _takes(reader: Reader, name: str, *, by_name: bool) -> bool:
    parameters = inspect.signature(reader).parameters
    return name in parameters if by_name else any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def own_forwards(modules: Iterable[nn.Module]) -> list[Reader]:
    """The forwards that a user has written for subclasses of these modules' classes."""
    kinds = {kind for module in modules for kind in type(module).__mro__}
    return [
        vars(kind)["forward"]
        for kind in kinds
        if "forward" in vars(kind) and kind.__module__.partition(".")[0] not in _OWN_PACKAGES
    ]


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward: then something must call it."""
    return any(vars(module)[name] for name in _HOOKS)
