"""Which private names of other libraries the packages use, found in their source; and whether a name exists upstream.

Private is what begins with one underscore: imported, read or set as an attribute, named in a string, passed as a
keyword, defined or used on `self` in a class that derives from a library's.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("lightning_npu_tp", "lit_models", "ascend_sim")
LIBRARIES = (
    "torch",
    "lightning",
    "transformers",
    "torchmetrics",
    "torch_npu",
    "huggingface_hub",
    "safetensors",
    "hydra",
)
LIBRARIES += ("omegaconf", "torchdata", "tokenizers")
_PRIVATE = re.compile(r"_(?!_)\w*[A-Za-z]\w*")
_PRIVATE_PATH = re.compile(rf"({'|'.join(LIBRARIES)})(\.\w+)*\.{_PRIVATE.pattern}(\.\w+)*")
OPERATOR = re.compile(r"(aten|c10d|_c10d_functional|_c10d_functional_autograd)::\w+")


@dataclass(frozen=True)
class Use:
    """A private name in our source. owner: of the name, dotted, where the source says it; else ""."""

    owner: str
    name: str
    where: str


def is_private(name: str) -> bool:
    """Whether a name is by convention not for others; `__dunder__` and `_` are no such names."""
    return _PRIVATE.fullmatch(name) is not None and not name.endswith("__")


# --- what a file says ------------------------------------------------------------------------------


def uses_in(tree: ast.Module, where: str, ours: set[str]) -> list[Use]:
    """Private names of libraries in a file. ours: those that our own code defines on `self`, anywhere."""
    aliases = _aliases(tree)
    own = own_names(tree)
    prose = _prose(tree)
    found: list[Use] = []
    for node in ast.walk(tree):
        here = f"{where}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            paths = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                paths = [f"{node.module}.{path}" for path in paths] if node.level == 0 else []
            found += [use for path in paths for use in _in_path(path, here)]
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            base = _dotted(node.value, aliases)
            if base is not None:
                found += _in_path(f"{base}.{node.attr}", here)[-1:]
            elif node.attr not in (ours if _is_self(node.value) else own):
                found.append(Use("", node.attr, here))
        elif isinstance(node, ast.keyword) and node.arg and is_private(node.arg):
            found.append(Use("", node.arg, here))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            if is_private(node.value) and node.value not in ours:
                found.append(Use("", node.value, here))
            elif _PRIVATE_PATH.fullmatch(node.value):
                found += _in_path(node.value, here)
    return found


def own_names(tree: ast.Module) -> set[str]:
    """Private names that a file defines: functions, classes, variables, attributes of `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return {name for name in found if is_private(name)}


def _aliases(tree: ast.Module) -> dict[str, str]:
    """Name in the file -> dotted path of what was imported."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str | None:
    """The path of an expression like `dist.group`, None for what is no import's."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id)
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value, aliases)
        return None if base is None else f"{base}.{node.attr}"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        # typing.cast and the two ways that our code asks for a module.
        if node.func.id == "cast":
            return _dotted(node.args[1], aliases)
        return {"import_torch_npu": "torch_npu"}.get(node.func.id)
    return None


def _in_path(path: str, where: str) -> list[Use]:
    """The private parts of a library's dotted path."""
    parts = path.split(".")
    if parts[0] not in LIBRARIES:
        return []
    return [Use(".".join(parts[:n]), part, where) for n, part in enumerate(parts) if is_private(part)]


def _is_self(node: ast.expr) -> bool:
    return (isinstance(node, ast.Name) and node.id in ("self", "cls")) or ast.unparse(node) == "super()"


def _prose(tree: ast.Module) -> set[ast.expr]:
    """Docstrings, and pieces of texts that are put together."""
    found = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return found.union(*(node.values for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)))


# --- what classes inherit --------------------------------------------------------------------------


def uses_by_inheritance(module: str) -> Iterator[Use]:
    """Private names that classes of a module define, read or set on themselves and that a library's base has, too."""
    for kind in vars(importlib.import_module(module)).values():
        if not inspect.isclass(kind) or kind.__module__ != module:
            continue
        bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] in LIBRARIES]
        for name, line in (_names_on_self(kind) if bases else {}).items():
            owner = next((base for base in bases if has(base, name)), None)
            if owner is not None:
                yield Use(f"{owner.__module__}.{owner.__qualname__}", name, f"{module}.{kind.__name__}, line {line}")


def _names_on_self(kind: type) -> dict[str, int]:
    lines, first = inspect.getsourcelines(kind)
    body = ast.parse(textwrap.dedent("".join(lines))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in [*ast.walk(body), *body.body]:
        if isinstance(node, ast.Attribute) and _is_self(node.value):
            found[node.attr] = first + node.lineno - 1
        elif isinstance(node, ast.FunctionDef) and node in body.body:
            found[node.name] = first + node.lineno - 1
    return {name: line for name, line in found.items() if is_private(name)}


@cache
def all_uses() -> tuple[Use, ...]:
    """Private names of libraries in all packages."""
    files = {path: ast.parse(path.read_text()) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    ours = set().union(*map(own_names, files.values()))
    found = [use for path, tree in files.items() for use in uses_in(tree, str(path.relative_to(ROOT)), ours)]
    for path in files:
        if path.name != "__main__.py" and path.relative_to(ROOT).parts[0] != "ascend_sim":
            found += uses_by_inheritance(
                ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            )
    return tuple(found)


@cache
def all_words() -> frozenset[str]:
    """Every attribute, keyword and string in our packages, docstrings left out."""
    found: set[str] = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text())
            prose = _prose(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute):
                    found.add(node.attr)
                elif isinstance(node, ast.keyword) and node.arg:
                    found.add(node.arg)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
                    found.add(node.value)
    return frozenset(found)


# --- what upstream says ----------------------------------------------------------------------------


def resolve(path: str) -> Any:
    """What a dotted path leads to. Raises ImportError or AttributeError."""
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError as error:
            if error.name is None or not path.startswith(error.name):
                raise
            continue
        for part in parts[n:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(path)


def has(owner: Any, name: str) -> bool:
    """Whether a module or class has the name, or the source of the class reads or sets it on `self` or writes it out.

    Instances get most attributes in methods, so that the class does not have them; any base may be the one that does.
    """
    if hasattr(owner, name):
        return True
    if inspect.ismodule(owner):
        try:
            importlib.import_module(f"{owner.__name__}.{name}")
        except ImportError:
            return False
        return True
    return any(name in _written(kind) for kind in getattr(owner, "__mro__", (owner,)))


@cache
def _written(owner: Any) -> frozenset[str]:
    """Attributes of `self` and strings in the source of a class or function; empty where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    except (TypeError, OSError, SyntaxError):
        return frozenset()
    prose = _prose(tree)
    nodes = [node for node in ast.walk(tree) if node not in prose]
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute) and _is_self(node.value)}
    return frozenset(attributes | {node.value for node in nodes if isinstance(node, ast.Constant)} - {None})
