"""Find the modules of a transformers model that a family replaces, count them, replace them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.models.families.family import BuildContext, ModelFamily


@dataclass(frozen=True)
class Swap:
    """A module to replace: its parent, its name there and the name of its class."""

    parent: nn.Module
    child: str
    kind: str


def find_swaps(model: nn.Module, family: ModelFamily, config: object) -> list[Swap]:
    """Modules to replace; one inside another that is replaced belongs to that one's constructor.

    Raises ConversionError when their number is not what the config says: a class that was renamed
    would otherwise keep its unsharded forward, and nobody would notice.
    """
    swaps: list[Swap] = []

    def visit(parent: nn.Module) -> None:
        for name, child in parent.named_children():
            kind = type(child).__name__
            if kind in family.swaps:
                swaps.append(Swap(parent, name, kind))
            else:
                visit(child)

    visit(model)
    found = Counter(swap.kind for swap in swaps)
    expected = Counter(family.expected(config)) if family.expected else Counter(dict.fromkeys(family.swaps, 1))
    wrong = [
        f"{found[kind]} of {kind} instead of {'at least ' if family.expected is None else ''}{number}"
        for kind, number in expected.items()
        if (found[kind] != number if family.expected else found[kind] < number)
    ]
    if wrong:
        raise ConversionError(
            f"{type(model).__name__} does not look like {family.name}: it has {', '.join(wrong)}. "
            f"The installed transformers may have changed the model; 5.17 to 5.23 are supported."
        )
    return swaps


def swap_modules(swaps: list[Swap], family: ModelFamily, context: BuildContext) -> Counter[str]:
    """Replace the modules of `swaps` in place; returns class name -> how many were replaced.

    Parameters and children keep the order that they had.
    """
    for swap in swaps:
        child = getattr(swap.parent, swap.child)
        replacement = family.swaps[swap.kind](child, context)
        replacement.train(child.training)
        _order_as(replacement, child)
        swap.parent.register_module(swap.child, replacement)
    return Counter(swap.kind for swap in swaps)


def _order_as(module: nn.Module, source: nn.Module) -> None:
    """Put what `module` has registered into the order of `source`; what that does not have comes last.

    torch's optimizers match saved states to parameters by their order: in another one a checkpoint of one file does not
    load into transformers' own model.
    """
    for kind in ("_modules", "_parameters", "_buffers"):
        own, other = getattr(module, kind), getattr(source, kind)
        for name in [name for name in other if name in own] + [name for name in own if name not in other]:
            own[name] = own.pop(name)
    for name, child in module.named_children():
        if isinstance(theirs := source._modules.get(name), nn.Module):
            _order_as(child, theirs)
