"""The private names of torch_npu that the package uses are there; the others' are tests/unit/test_upstream.py's."""

from __future__ import annotations

import pytest
import torch_npu
from upstream_names import NPU, Names
from upstream_walk import has, resolve


@pytest.mark.parametrize("entry", NPU, ids=lambda entry: f"{entry.owner}:{entry.names}")
def test_what_we_use_is_there(entry: Names) -> None:
    for name in entry.names.split():
        assert has(resolve(entry.owner), name), (
            f"torch_npu {torch_npu.__version__} has no {entry.owner}.{name} any more. Needed for: {entry.why} "
            f"Without it: {entry.loss}"
        )
