"""Find the modules of a transformers model that a family replaces, count them, replace what they are.

The object stays and becomes another: who holds the module holds the sharded one, its hooks run and its attributes
are there. Only a module that its replacement keeps inside is put in another's place.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.models.families.family import BuildContext, ModelFamily


@dataclass(frozen=True)
class Swap:
    """A module to replace: its parent, its name there and the name of its class."""

    parent: nn.Module
    child: str
    kind: str


# What every module has and a user may have changed: hooks, and whether it trains.
_USERS = {name for name in vars(nn.Module()) if "hook" in name} | {"training"}


def find_swaps(model: nn.Module, family: ModelFamily, config: object) -> list[Swap]:
    """Modules to replace; one inside another that is replaced belongs to that one's constructor.

    Raises ConversionError when their number is not what the config says, since a class that was renamed
    would otherwise keep its unsharded forward, and nobody would notice; and for a forward of the user's own, which
    the replacement would not run.
    """
    swaps: list[Swap] = []
    is_transformers_own = any(
        base.__name__ == family.model_class and _package(base) == "transformers" for base in type(model).__mro__
    )
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
                for inside, module in child.named_modules():
                    if inside != "act_fn":
                        own = f"{path}{name}{'.' if inside else ''}{inside}"
                        _refuse_own_forward(own, module, is_transformers_own)
            else:
                visit(child, f"{path}{name}.")

    visit(model, "")
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


def _package(thing: Any) -> str:
    return str(thing.__module__).partition(".")[0]


def _refuse_own_forward(path: str, module: nn.Module, is_transformers_own: bool) -> None:
    """Raise ConversionError for a forward that transformers has not written, of a module that is replaced."""
    is_patched = "forward" in vars(module)
    is_foreign = is_transformers_own and _package(type(module).forward) not in ("transformers", "torch")
    if is_patched or is_foreign:
        raise ConversionError(
            f"{path} ({type(module).__name__}) has a forward of its own, "
            f"{'set on the module' if is_patched else f'from {type(module).forward.__module__}'}, which the sharded "
            f"module in its place would not run. Use a forward hook, a subclass of the decoder layer around it, or a "
            f"ModelFamily of your own whose constructor knows it."
        )


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
        if any(module is child for module in replacement.modules()):
            swap.parent.register_module(swap.child, replacement)
            continue
        became: dict[int, nn.Module] = {}
        _become(child, replacement, became)
        for module in child.modules():
            _point_at(module, became)
    return Counter(swap.kind for swap in swaps)


def _become(module: nn.Module, replacement: nn.Module, became: dict[int, nn.Module]) -> None:
    """Let `module` be what `replacement` is, children of one name likewise, and keep its hooks and attributes.

    became: id of each replacement -> the module that is it now; filled.
    """
    for name, child in replacement.named_children():
        theirs = module._modules.get(name)
        if isinstance(theirs, nn.Module) and not any(inside is theirs for inside in child.modules()):
            _become(theirs, child, became)
            replacement._modules[name] = theirs
    for name, child in module.named_children():
        # What a user has put there beside transformers' own; its parameters would have had no rule.
        replacement._modules.setdefault(name, child)
    mine, new = vars(module), vars(replacement)
    for name in _USERS:
        if isinstance(mine[name], dict):
            mine[name].update(new[name])
    mine.update({name: value for name, value in new.items() if name not in _USERS})
    module.__class__ = type(replacement)
    became[id(replacement)] = module


def _point_at(module: nn.Module, became: dict[int, nn.Module]) -> None:
    """Replace what the module's attributes name, one level deep, by what it became."""
    held = [value for value in vars(module).values() if isinstance(value, nn.Module)]
    for holder in (module, *held):
        for names in (vars(holder), holder._modules):
            for name, value in names.items():
                if id(value) in became:
                    names[name] = became[id(value)]


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
