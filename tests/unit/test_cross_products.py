"""Catches a name in tests/cross_products.py that no test has any more, so that a product would silently run whole, and
a kept case that is gone, so that `make test` would silently run none."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import cross_products
import pytest

TESTS = Path(__file__).parents[1]


def marked(*names: str, are_all: bool = True) -> list[str]:
    """Of items with these names, those that are left to `make test-all`."""
    found: list[str] = []
    items = [SimpleNamespace(name=name, add_marker=lambda _, name=name: found.append(name)) for name in names]
    cross_products.mark(items, are_all=are_all)
    return found


def test_every_name_is_that_of_a_test():
    defined = {
        node.name
        for file in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert set(cross_products.IN_MAKE_TEST) <= defined


def test_what_is_named_is_kept_and_the_rest_is_left():
    name = "test_the_same_run_twice_is_bit_identical"
    assert marked(f"{name}[sizes0]", f"{name}[sizes2]", "test_something_else[sizes0]") == [f"{name}[sizes0]"]
    assert marked("test_rows_that_a_kill_took_come_back") == ["test_rows_that_a_kill_took_come_back"]


def test_a_product_none_of_whose_cases_is_kept_is_an_error():
    name = "test_the_same_run_twice_is_bit_identical"
    with pytest.raises(pytest.UsageError, match=f"{name}.*sizes2"):
        marked(f"{name}[sizes0]", f"{name}[sizes1]")
    assert marked(f"{name}[sizes0]", are_all=False) == [f"{name}[sizes0]"], "one that was asked for by its name"
