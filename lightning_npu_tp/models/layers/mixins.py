"""Makes a transformers model, its decoder and its layers instances of our classes, each in its place.

A class of the user's own stays in front: its forward runs, and finds ours where it calls its parent's.
"""

from __future__ import annotations

from torch import nn

from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.models.layers.sharded_causal_lm import ShardedDecoderLayer

_SUBCLASSES: dict[tuple[type, type], type] = {}


def mix_in(module: nn.Module, mixin: type) -> None:
    """Make `module` an instance of its class with `mixin` in it, keeping its state; twice is once.

    module: of a list, each of its children becomes one. The mixin's forward takes the place of transformers'; that of
            a user's own subclass still runs, and finds the mixin's where it calls its parent's.
    """
    if isinstance(module, nn.ModuleList):
        for child in module:
            mix_in(child, mixin)
    elif not isinstance(module, mixin):
        key = (mixin, type(module))
        if key not in _SUBCLASSES:
            _SUBCLASSES[key] = _subclass(type(module), mixin)
        module.__class__ = _SUBCLASSES[key]


def _subclass(kind: type, mixin: type) -> type:
    base = next((parent for parent in kind.__mro__ if parent.__module__.startswith("transformers.")), kind)
    sharded = type(f"Sharded{base.__name__}", (mixin, base), {})
    return sharded if kind is base else type(f"Sharded{kind.__name__}", (kind, sharded), {})


def check_parts(module: nn.Module, mixin: type) -> None:
    """Raise ConversionError for a decoder layer whose parts are others than the mixin computes with.

    A subclass of the user's own may have more; what they do is said in its forward.
    """
    if isinstance(module, nn.ModuleList):
        for child in module:
            check_parts(child, mixin)
    elif issubclass(mixin, ShardedDecoderLayer) and not isinstance(module, mixin):
        parts, known = {name for name, _ in module.named_children()}, set(ShardedDecoderLayer.__annotations__)
        is_transformers_own = type(module).__module__.startswith("transformers.")
        if parts != known if is_transformers_own else not known <= parts:
            raise ConversionError(
                f"{type(module).__name__} has the parts {sorted(parts)}, and ShardedDecoderLayer computes with "
                f"{sorted(known)}. Give the family a mixin of its own for model.layers."
            )
