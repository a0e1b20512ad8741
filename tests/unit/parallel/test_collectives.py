"""Collectives in a group of one, and counts that are refused; the rest needs ranks.

Catches: a single process that communicates, aliases its input or accepts counts that do not add up.
"""

from __future__ import annotations

import pytest
import torch

from lightning_npu_tp.errors import CountMismatch
from lightning_npu_tp.parallel.collectives import (
    copy_to_group,
    gather_last_dim,
    group_rank,
    group_size,
    reduce_from_group,
    start_exchange,
)


def test_a_single_process_needs_no_group_and_passes_tensors_through():
    assert (group_size(None), group_rank(None)) == (1, 0)
    first, second = torch.ones(2, requires_grad=True), torch.ones(3)
    assert copy_to_group(first, group=None) is first
    assert copy_to_group(first, second, group=None) == (first, second)
    assert reduce_from_group(first, None) is first
    assert gather_last_dim(first, [2], None) is first


@pytest.mark.parametrize("sizes", [[3], [2, 0], []])
def test_sizes_that_are_not_the_ranks_are_refused(sizes):
    with pytest.raises(CountMismatch, match="one entry for each of the 1 ranks, and rank 0's must be the 2 columns"):
        gather_last_dim(torch.ones(4, 2), sizes, None)


def test_exchanging_rows_with_oneself_copies_them():
    rows = torch.randn(3, 2, requires_grad=True)
    received = start_exchange(rows, [3], [3], None).wait()
    assert torch.equal(received, rows) and received.data_ptr() != rows.data_ptr()
    received.square().sum().backward()
    torch.testing.assert_close(rows.grad, 2 * rows.detach())


@pytest.mark.parametrize(
    ("send", "recv", "words"),
    [
        ([2], [2], "must be non-negative and add up to the 3 rows"),
        ([3], [2], "receives what it sends"),
        ([1, 2], [3], "send_rows has 2 and recv_rows 1 entries, but the group has 1 ranks"),
        ([-3], [-3], "non-negative"),
    ],
)
def test_counts_that_do_not_add_up_are_refused(send, recv, words):
    with pytest.raises(CountMismatch, match=words):
        start_exchange(torch.zeros(3, 2), send, recv, None).wait()
