"""The sizes of a run's axes, before any process exists.

Catches: a layout that leaves ranks over or counts them twice, and an error that does not name the sizes
that would work.
"""

from __future__ import annotations

import re

import pytest

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes, divisors


@pytest.mark.parametrize(
    ("given", "layout"),
    [
        ({"world": 4}, (1, 4, 4)),
        ({"world": 1}, (1, 1, 1)),
        ({"world": 8, "data": 2}, (2, 4, 4)),
        ({"world": 8, "tensor": 2}, (4, 2, 2)),
        ({"world": 8, "tensor": 2, "expert": 8}, (4, 2, 8)),
        ({"world": 8, "data": 8, "expert": 4}, (8, 1, 4)),
        ({"world": 6, "data": 3, "tensor": 2, "expert": 6}, (3, 2, 6)),
    ],
)
def test_auto_sizes_use_every_rank_once(given, layout):
    resolved = Layout.resolve(**given)
    assert (resolved.data, resolved.tensor, resolved.expert) == layout
    assert resolved.data * resolved.tensor == resolved.world == given["world"]
    assert resolved.expert_replicas * resolved.expert == resolved.world
    # Whether some axis has all ranks: here all but the two that mix the axes.
    assert bool(resolved.axes_of_all) == (layout not in {(2, 4, 4), (4, 2, 2)})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"world": 4, "tensor": 3}, "tensor_parallel_size=3 does not divide the 4 devices of this run. "
         "Set strategy.tensor_parallel_size to one of [1, 2, 4]"),
        ({"world": 4, "data": 3}, "Set strategy.data_parallel_size to one of [1, 2, 4]"),
        ({"world": 4, "data": 2, "tensor": 4}, "is 8, but this run has 4 devices"),
        ({"world": 8, "tensor": 2, "expert": 3}, "Set strategy.expert_parallel_size to 'auto' or one of [2, 4, 8]"),
        ({"world": 8, "tensor": 4, "expert": 2}, "must be a multiple of tensor_parallel_size=4"),
        ({"world": 4, "tensor": 0}, "tensor_parallel_size=0 is neither 'auto' nor a positive integer"),
        ({"world": 4, "data": "2"}, "data_parallel_size='2' is neither"),
        ({"world": 4, "expert": True}, "expert_parallel_size=True is neither"),
        ({"world": 4, "expert": 2.0}, "expert_parallel_size=2.0 is neither"),
        ({"world": 4, "data": -1}, "data_parallel_size=-1 is neither"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(given, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        Layout.resolve(**given)


def test_divisors_are_all_and_ascending():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]


def axes_and_groups(rank, world_size):
    import torch.distributed as dist

    def ranks(group):
        return tuple(dist.get_process_group_ranks(group)) if group is not None else None

    found = {}
    for given in ({}, {"data": 2}, {"data": 2, "expert": 4}, {"data": 4}, {"data": 4, "expert": 2}):
        meshes = Meshes.build(Layout.resolve(world=world_size, **given), "cpu")
        groups = Groups(meshes)
        found[str(given)] = (
            ranks(meshes.data_group),
            ranks(meshes.tensor_group),
            ranks(meshes.expert_group),
            ranks(groups.tensor()),
            ranks(groups.expert()),
        )
    groups.close()
    refused = ""
    try:
        groups.expert()
    except ConfigError as error:
        refused = str(error)
    groups.bind(meshes)
    return found, refused, ranks(groups.expert())


def test_the_tensor_axis_is_fastest_and_experts_are_a_second_view_of_the_same_ranks(on_ranks):
    results = on_ranks(axes_and_groups, 4)
    everyone = (0, 1, 2, 3)
    found, refused, again = results[2]
    assert found == {
        "{}": ((2,), everyone, everyone, everyone, everyone),
        "{'data': 2}": ((0, 2), (2, 3), (2, 3), (2, 3), (2, 3)),
        "{'data': 2, 'expert': 4}": ((0, 2), (2, 3), everyone, (2, 3), everyone),
        "{'data': 4}": (everyone, (2,), (2,), None, None),
        "{'data': 4, 'expert': 2}": (everyone, (2,), (2, 3), None, (2, 3)),
    }
    assert "after the trainer had destroyed its process group" in refused
    assert again == (2, 3)
