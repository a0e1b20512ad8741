"""The operator table against the wheel and the dispatcher of the torch_npu that is installed.

Catches a table that was made from another wheel, and a class that torch_npu's own registrations contradict.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import torch
import torch_npu  # noqa: F401

from lightning_npu_tp.tools.operators import operator_table

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_operator_table.py"
# Of sparse tensors only.
SPARSE = {"aten::_coalesce"}


def has(operator: str, key: str = "PrivateUse1") -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def test_the_table_is_what_the_installed_wheels_say() -> None:
    # A process of its own: here torch_npu has registered its kernels, which the wheel's files are asked for.
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dispatcher_has_a_kernel_for_native_operators_and_for_no_other() -> None:
    table = operator_table()
    aten = {name: kind for name, kind in table.classes.items() if name.startswith("aten::")}
    assert {name for name, kind in aten.items() if kind == "native" and not has(name)} == SPARSE
    assert all(has(name, "SparsePrivateUse1") for name in SPARSE)
    assert not [name for name, kind in aten.items() if kind in ("implicit", "explicit", "neither") and has(name)]
    # The simulator wraps the fallback of each operator to count it; those that get there by another are 82.
    assert sum(has(name) for name, kind in aten.items() if kind == "fallback") == 227
    custom = [name for name, kind in table.classes.items() if kind == "custom"]
    known = set(torch._C._dispatch_get_all_op_names())
    assert sum(name in known for name in custom) > 300


def test_what_the_table_calls_a_fallback_warns_of_one(capfd) -> None:
    x = torch.rand(4, device="npu") + 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.mode(x), torch.digamma(x), torch.logcumsumexp(x, 0)
    said = capfd.readouterr().err
    for operator in ("aten::mode", "aten::digamma.out", "aten::_logcumsumexp"):
        assert f"The operator '{operator}' is not currently supported" in said
        assert operator_table().of(operator) == "fallback"
    assert operator_table().of("aten::digamma") == "fallback"
