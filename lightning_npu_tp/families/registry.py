"""The supported model families: an explicit tuple, and errors that list it."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.families.deepseek_v2 import DEEPSEEK_V2
from lightning_npu_tp.families.family import ModelFamily

FAMILIES: tuple[ModelFamily, ...] = (DEEPSEEK_V2,)


def supported() -> list[str]:
    """Names of the supported families, as `architecture` takes them."""
    return [family.name for family in FAMILIES]


def family_named(name: str, extra: Sequence[ModelFamily] = ()) -> ModelFamily:
    """The family of that name; `extra` are the user's own, which win.

    Raises ConversionError that lists the names.
    """
    known = (*extra, *FAMILIES)
    for family in known:
        if family.name == name:
            return family
    raise ConversionError(
        f"The model type {name!r} is not supported. Supported: {', '.join(family.name for family in known)}. "
        f"Another model needs its own ModelFamily (see examples/own_model.py)."
    )
