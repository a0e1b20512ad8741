"""Catches a part of launch/ that comes to know checkpoints, models or explanations."""

from __future__ import annotations

import ast
from pathlib import Path

import lightning_npu_tp

PACKAGE = Path(lightning_npu_tp.__file__).parent
BELOW = {"errors", "devices", "parallel", "launch"}


def test_launch_imports_only_what_lies_below_it() -> None:
    for file in (PACKAGE / "launch").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_npu_tp"):
                rooms = {f"{node.module}.{alias.name}".split(".")[1] for alias in node.names}
                assert rooms <= BELOW, f"{file.name} imports {rooms - BELOW}"
