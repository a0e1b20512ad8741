"""Catches: an import that points up, a circle between modules, a file beside the rooms, and a map of the tree
(docs/architecture.md) that names what does not exist or leaves a folder out.

Imports are read from the source, nothing is imported, so that those inside of functions are seen too. The order of the
rooms is the page's: it is read there and nowhere else.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_npu_tp"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
MOST_ROOMS = 13
# What may lie beside the rooms: the face, the command line's second door, the errors, the mark of a typed package.
FLAT = {"__init__.py", "__main__.py", "errors.py", "py.typed"}


@dataclass(frozen=True)
class Import:
    """One import statement's target, as far as it is a module of the package or another package's name."""

    source: str
    target: str
    line: int
    # Inside a function, or for a type checker only: it does not run when the module is loaded.
    later: bool

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def dotted(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    """The folder or file below the package; "" for the package itself."""
    return "".join(module.split(".")[1:2])


def statements(node: ast.AST, later: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, later
        in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        yield from statements(child, later or in_function or for_types)


@cache
def imports_of(file: Path) -> tuple[Import, ...]:
    source, found = dotted(file), []
    package = source if file.name == "__init__.py" else source.rpartition(".")[0]
    for node, later in statements(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else str(node.module)
            names = [f"{base}.{alias.name}" for alias in node.names]
            # `from package import module` names a module, `from module import name` does not.
            targets = [name if name in MODULES else base for name in names]
        found += [Import(source, target, node.lineno, later) for target in dict.fromkeys(targets)]
    return tuple(found)


def all_imports() -> list[Import]:
    return [found for file in MODULES.values() for found in imports_of(file)]


def rooms() -> list[str]:
    """The rooms of the page's table from top to bottom: `tools/`, …, `errors.py`."""
    section = PAGE.split("## The rooms")[1].split("\n## ")[0]
    return re.findall(r"(?m)^\| `([\w.]+)/?`", section)


# --- the tree -------------------------------------------------------------------------------------


def test_the_page_lists_the_rooms_that_there_are() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    listed = rooms()
    assert len(set(listed)) == len(listed)
    assert set(listed) == folders | {"errors.py"}
    assert len(folders) <= MOST_ROOMS


def test_nothing_else_lies_beside_the_rooms() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} <= FLAT


def test_every_folder_of_the_package_is_named() -> None:
    folders = {str(file.parent.relative_to(PACKAGE)) for file in MODULES.values()} - {"."}
    assert not [folder for folder in sorted(folders) if f"`{folder}/`" not in PAGE]


# --- imports --------------------------------------------------------------------------------------


def test_imports_between_rooms_point_down_only() -> None:
    """Also inside functions, and for types only: whoever reads a room must know what it speaks of."""
    height = {name.removesuffix(".py"): -place for place, name in enumerate(rooms())}
    wrong = []
    for found in all_imports():
        if found.target not in MODULES or room(found.source) in ("", "__main__"):
            continue
        here, there = room(found.source), room(found.target)
        if here != there and (there in ("", "__main__") or height[there] > height[here]):
            wrong.append(str(found))
    assert not wrong, "\n".join(["imports that point up:", *wrong])


def test_no_modules_import_each_other_in_a_circle() -> None:
    """When they are loaded; an import inside of a function or for types waits until all of them are there."""
    edges: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in all_imports():
        if found.target in MODULES and found.target != found.source and not found.later:
            edges[found.source].add(found.target)
    # Whoever imports nothing that is left, or is imported by nobody, is taken away, until only circles remain.
    while free := {
        module
        for module, targets in edges.items()
        if not targets & edges.keys() or not any(module in others for others in edges.values())
    }:
        edges = {module: targets for module, targets in edges.items() if module not in free}
    assert not edges, f"a circle among {sorted(edges)}"


def test_the_package_knows_nothing_of_what_stands_on_it() -> None:
    strangers = {"lit_models", "hydra", "omegaconf", "train", "benchmarks", "tests"}
    assert not [str(found) for found in all_imports() if found.target.split(".")[0] in strangers]
    users = {room(found.source) for found in all_imports() if found.target.split(".")[0] == "ascend_sim"}
    assert users <= {"tools"}, "only a tool may ask for simulated cards"


def test_the_simulator_imports_nothing_of_ours() -> None:
    files = sorted((ROOT / "ascend_sim").rglob("*.py"))
    ours = {"lightning_npu_tp", "lit_models"}
    assert len(files) > 10
    assert not [str(found) for file in files for found in imports_of(file) if found.target.split(".")[0] in ours]


# --- what the page names --------------------------------------------------------------------------

NAMED = sorted(set(re.findall(r"`([\w.-]+(?:/[\w.-]+)*(?:\.(?:py|md|yaml)(?::[\w.]+)?|/))`", PAGE)))


def defines(body: list[ast.stmt], name: str) -> ast.stmt | None:
    """The class, function or assignment of that name among `body`."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node
    return None


@pytest.mark.parametrize("named", NAMED)
def test_what_the_page_names_exists(named: str) -> None:
    path, _, symbol = named.partition(":")
    place = next((base / path for base in (PACKAGE, ROOT) if (base / path).exists()), None)
    assert place is not None, f"{path} is neither in lightning_npu_tp/ nor in the root"
    body: list[ast.stmt] = ast.parse(place.read_text()).body if symbol else []
    for part in symbol.split(".") if symbol else ():
        found = defines(body, part)
        assert found is not None, f"{path} has no {symbol}"
        body = getattr(found, "body", [])


def test_the_page_is_read() -> None:
    assert len(NAMED) > 60 and sum(":" in named for named in NAMED) > 40
