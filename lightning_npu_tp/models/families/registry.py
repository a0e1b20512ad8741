"""The supported model families: an explicit tuple, errors that list it, and the table of it for docs/own-models.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.models.families.deepseek_v2 import DEEPSEEK_V2
from lightning_npu_tp.models.families.deepseek_v3 import DEEPSEEK_V3
from lightning_npu_tp.models.families.family import ModelFamily
from lightning_npu_tp.models.families.llama import LLAMA
from lightning_npu_tp.models.families.mixtral import MIXTRAL
from lightning_npu_tp.models.families.olmoe import OLMOE
from lightning_npu_tp.models.families.qwen2 import QWEN2
from lightning_npu_tp.models.families.qwen2_moe import QWEN2_MOE
from lightning_npu_tp.models.families.qwen3 import QWEN3
from lightning_npu_tp.models.families.qwen3_moe import QWEN3_MOE

FAMILIES: tuple[ModelFamily, ...] = (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    QWEN2_MOE,
    QWEN3_MOE,
    MIXTRAL,
    OLMOE,
    LLAMA,
    QWEN2,
    QWEN3,
)


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


def family_of(config: Any, extra: Sequence[ModelFamily] = ()) -> ModelFamily | None:
    """The family of a config: of that model_type, else one with the same setting for experts, else None."""
    known, kind = (*extra, *FAMILIES), getattr(config, "model_type", None)
    named = (family for family in known if family.name == kind)
    return next(named, None) or next((family for family in known if family.num_experts(config)), None)


def find_models(root: nn.Module, families: Sequence[ModelFamily]) -> Iterator[tuple[str, nn.Module, ModelFamily]]:
    """Supported models inside `root`, outermost first; a model inside another is not listed."""
    found: list[str] = []
    for name, module in root.named_modules():
        if any(name.startswith(f"{outer}." if outer else "") for outer in found):
            continue
        for family in families:
            if family.matches(module):
                found.append(name)
                yield name, module, family
                break


def families_table() -> str:
    """The supported families as a Markdown table; `python -m lightning_npu_tp.models.families` prints it."""
    rows = [("`model.architecture`", "transformers class", "models", "refused"), ("---",) * 4]
    rows += [(f"`{f.name}`", f"`{f.model_class}`", f.models, f.refused) for f in FAMILIES]
    return "\n".join(f"| {' | '.join(cells)} |".replace("  |", " |") for cells in rows)
