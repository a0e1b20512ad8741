"""Gradients of every family on one simulated card, fused kernels on, against the CPU; float32 and bfloat16.

Catches a family whose layers use a kernel in a way that the few models of test_kernels_npu_models.py do not.
"""

from __future__ import annotations

import pytest
from fused import FLOAT32, distance
from test_kernels_npu_models import PLAIN, choices_of, converted, one_rank, repeating, train, worst
from torch import Tensor

from lightning_npu_tp.models.families.registry import FAMILIES
from lightning_npu_tp.tools.testing.models import random_batch, reference_model, tiny_config

__all__ = ["one_rank"]
# torch_npu's own deepcopy of a tensor asks torch for what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")


# A result that is rounded to bfloat16 is off by up to 2^-8; some eight of them lie on the way through a layer.
BFLOAT16 = 8 * 2**-8


def whole(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Distance of all gradients as one vector."""
    off = sum((got[name].cpu().double() - gradient).square().sum() for name, gradient in wanted.items())
    return float((off / sum(gradient.square().sum() for gradient in wanted.values())).sqrt())


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_gradients_of_a_family_are_the_cpus(one_rank, family):  # noqa: F811
    config = tiny_config(family)
    model, batch = reference_model(config), random_batch(config, 2, 12, seed=0, padding=True)
    model.load_state_dict({key: value.bfloat16().double() for key, value in model.state_dict().items()})
    exact = converted(model, "cpu")
    choices = choices_of(exact)
    _, wanted = train(exact, "cpu", batch)
    _, got = train(repeating(converted(model.float(), "npu"), choices), "npu", batch)
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        assert distance(gradient, wanted[name]) <= FLOAT32, name
    model.bfloat16()
    _, fused = train(repeating(converted(model, "npu"), choices), "npu", batch)
    _, plain = train(repeating(converted(model, "npu", PLAIN), choices), "npu", batch)
    assert worst(fused, wanted) <= 1.5 * worst(plain, wanted)
    assert whole(fused, wanted) <= BFLOAT16
