"""Makes a transformers model, its decoder and its layers instances of our classes, each in its place.

A class of the user's own stays in front: its forward runs, and finds ours where it calls its parent's.
"""

from __future__ import annotations

from torch import nn

from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.models.layers.sharded_causal_lm import ShardedDecoderLayer

_SUBCLASSES: dict[tuple[type, type], type] = {}


def mix_in(module: nn.Module, mixin: type, *, keep_foreign: bool = False) -> None:
    """Make `module` an instance of its class with `mixin` in it, keeping its state; twice is once.

    module: of a list, each of its children becomes one. The mixin's forward takes the place of transformers'; that of
            a user's own subclass still runs, and finds the mixin's where it calls its parent's.
    keep_foreign: leave alone a module with no class of transformers' among its parents. It is a user's, in a model of
            transformers', and its forward calls the sharded parts by itself.
    """
    if isinstance(module, nn.ModuleList):
        for child in module:
            mix_in(child, mixin, keep_foreign=keep_foreign)
    elif not isinstance(module, mixin) and (not keep_foreign or _is_of_transformers(type(module))):
        key = (mixin, type(module))
        if key not in _SUBCLASSES:
            _SUBCLASSES[key] = _subclass(type(module), mixin)
        module.__class__ = _SUBCLASSES[key]


def _is_of_transformers(kind: type) -> bool:
    return any(parent.__module__.startswith("transformers.") for parent in kind.__mro__)


def _subclass(kind: type, mixin: type) -> type:
    base = next((parent for parent in kind.__mro__ if parent.__module__.startswith("transformers.")), kind)
    sharded = type(f"Sharded{base.__name__}", (mixin, base), {})
    return sharded if kind is base else type(f"Sharded{kind.__name__}", (kind, sharded), {})


def check_parts(module: nn.Module, mixin: type, *, keep_foreign: bool = False) -> None:
    """Raise ConversionError for a decoder layer whose parts are others than the mixin computes with.

    A subclass of the user's own may have more; what they do is said in its forward. keep_foreign: see `mix_in`.
    """
    if isinstance(module, nn.ModuleList):
        for child in module:
            check_parts(child, mixin, keep_foreign=keep_foreign)
    elif keep_foreign and not _is_of_transformers(type(module)):
        return
    elif issubclass(mixin, ShardedDecoderLayer) and not isinstance(module, mixin):
        parts, known = {name for name, _ in module.named_children()}, set(ShardedDecoderLayer.__annotations__)
        is_transformers_own = type(module).__module__.startswith("transformers.")
        if parts != known if is_transformers_own else not known <= parts:
            raise ConversionError(
                f"{type(module).__name__} has the parts {sorted(parts)}, and ShardedDecoderLayer computes with "
                f"{sorted(known)}. Give the family a mixin of its own for model.layers."
            )
