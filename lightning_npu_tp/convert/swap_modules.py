"""Find the modules of a transformers model that a family replaces, count them, replace them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.models.families.family import BuildContext, ModelFamily
from lightning_npu_tp.models.families.registry import FAMILIES


@dataclass(frozen=True)
class Swap:
    """A module to replace: its parent, its name there and the name of its class."""

    parent: nn.Module
    child: str
    kind: str


def find_swaps(model: nn.Module, family: ModelFamily, config: object) -> list[Swap]:
    """Modules to replace; one inside another that is replaced belongs to that one's constructor.

    Raises ConversionError when their number is not what the config says: a class that was renamed
    would otherwise keep its unsharded forward, and nobody would notice. And for a class of a user's own in the place
    of one that a built-in family replaces: what its forward computes would be lost.
    """
    swaps: list[Swap] = []
    own: list[str] = []
    packages = {
        "torch",
        "transformers",
        *(_package(c) for c in type(model).__mro__ if c.__name__ == family.model_class),
    }

    def visit(parent: nn.Module, path: str) -> None:
        for name, child in parent.named_children():
            kind = type(child).__name__
            if kind in family.swaps:
                swaps.append(Swap(parent, name, kind))
                # A dense MLP keeps its activation.
                inside = ((below, module) for below, module in child.named_modules() if below != "act_fn")
                own.extend(_named(f"{path}{name}.{b}", m) for b, m in inside if _package(type(m)) not in packages)
            else:
                visit(child, f"{path}{name}.")

    visit(model, "")
    if own and family in FAMILIES:
        raise ConversionError(
            f"{', '.join(own)}: a class of your own in the place of one that the family {family.name} replaces, so "
            f"that its forward would be lost. Put transformers' own class there, or pass a ModelFamily in families= "
            f"whose swaps name yours."
        )
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
            + _why(model, packages)
        )
    return swaps


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _named(path: str, module: nn.Module) -> str:
    return f"{path.rstrip('.')} is a {type(module).__name__}"


def _why(model: nn.Module, packages: set[str]) -> str:
    """What a wrong number of modules may come from."""
    own = [
        _named(path, module)
        for path, module in model.named_modules()
        if path and _package(type(module)) not in packages
    ]
    if own:
        return (
            f"Classes of your own are among its modules ({', '.join(own)}): put transformers' own class there, or pass "
            f"a ModelFamily in families= whose swaps name yours."
        )
    return "The installed transformers may have changed the model; 5.17 to 5.23 are supported."


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
