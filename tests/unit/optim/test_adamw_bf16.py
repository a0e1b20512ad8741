"""AdamW over bfloat16 weights with their float32 masters.

Catches a master that differs in a bit from the one that float32 training has (above all where a value lies half way
between two bfloat16 numbers), a state that loading rounds to the dtype of its parameter, random bits that depend on
which rank holds an element, moments that drift, and memory that grows with the model.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.optim import AdamWBF16
from lightning_npu_tp.optim.adamw_bf16 import master_of
from lightning_npu_tp.optim.exchange import give_halves, take_masters
from lightning_npu_tp.optim.noise import key_of, noise, place_of
from lightning_npu_tp.optim.split_float import join, round_stochastically, split


def many_floats() -> Tensor:
    """Both signs, all sizes, infinities and NaNs, and every lower half beside an even and an odd upper one."""
    spread = torch.arange(-(2**31), 2**31 - 1, 2**11 + 1, dtype=torch.int64).to(torch.int32)
    near_one, below_minus_two = (torch.arange(2**17, dtype=torch.int32) + start for start in (0x3F800000, -0x40000000))
    largest = torch.arange(0x7F7F0000, 0x7F800001, dtype=torch.int64).to(torch.int32)
    return torch.cat([spread, near_one, below_minus_two, largest]).view(torch.float32)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_both_halves_make_the_same_bits_again(moments: torch.dtype) -> None:
    values = many_floats()
    second = torch.rand(values.shape).to(moments)
    weight, remainder = (torch.empty_like(values, dtype=dtype) for dtype in (torch.bfloat16, torch.int16))
    spare, back, marked = torch.empty_like(values, dtype=torch.int32), torch.empty_like(values), second.clone()
    split(values, weight, remainder, marked, spare)
    is_nan = values.isnan()
    assert torch.equal(weight[~is_nan], values[~is_nan].bfloat16())
    assert torch.equal(marked.abs(), second) and 0 < marked.signbit().sum() < 1000
    join(weight, remainder, marked, back, spare)
    assert (
        torch.equal(back[~is_nan].view(torch.int32), values[~is_nan].view(torch.int32)) and back[is_nan].isnan().all()
    )
    assert torch.equal(marked, second)


def pairs(dtype: torch.dtype = torch.bfloat16) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """bfloat16 parameters and float32 ones of the same values: a matrix in another order, a vector, experts."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(70, 51), (300,), (3, 40, 25), ()]
    values = [torch.randn(shape, generator=generator).mul_(0.02).to(dtype) for shape in shapes]
    values[0] = values[0].t().contiguous().t()
    return [nn.Parameter(value.clone()) for value in values], [nn.Parameter(value.float()) for value in values]


def steps(optimizers: Any, num_steps: int, *parameters: list[nn.Parameter], first: int = 0) -> None:
    for step in range(first, first + num_steps):
        generator = torch.Generator().manual_seed(step)
        for same in zip(*parameters, strict=True):
            gradient = torch.randn(same[0].shape, generator=generator).bfloat16()
            for parameter in same:
                # In the parameter's order of memory, as autograd leaves it: torch's fused kernel assumes it.
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("bucket_mib", [64, 0.0503])
def test_masters_are_those_of_float32_training_bit_for_bit(options: dict[str, bool], bucket_mib: float) -> None:
    narrow, wide = pairs()
    settings: Any = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.1, **options}
    ours, marks = AdamWBF16(narrow, bucket_mib=bucket_mib, **settings), []
    ours.register_step_post_hook(
        lambda *_: marks.extend(state["exp_avg_sq"].signbit().sum().item() for state in ours.state.values())
    )
    steps([ours, torch.optim.AdamW(wide, **settings)], 100, narrow, wide)
    for (parameter, master), expected in zip(ours.masters(), wide, strict=True):
        assert torch.equal(master, expected) and torch.equal(parameter, expected.bfloat16())
        assert ours.state[parameter]["step"] == 100
    # Where a master came to lie half way, it has gone on from there.
    assert sum(marks[: -len(narrow)]) > 0


def test_a_gradient_may_come_in_another_order_of_memory() -> None:
    parameters = [nn.Parameter(torch.randn(30, 7).bfloat16().t().contiguous().t()) for _ in range(2)]
    with torch.no_grad():
        parameters[1].copy_(parameters[0])
    gradient = torch.randn(30, 7).bfloat16()
    parameters[0].grad, parameters[1].grad = gradient, torch.empty_like(parameters[1]).copy_(gradient)
    for parameter in parameters:
        AdamWBF16([parameter]).step()
    assert parameters[0].grad.stride() != parameters[1].grad.stride() and torch.equal(*parameters)


def test_parameters_of_other_dtypes_are_updated_as_torch_does() -> None:
    for dtype in (torch.float32, torch.float64):
        (parameters, _), (others, _) = pairs(dtype), pairs(dtype)
        ours, torchs = AdamWBF16(parameters, lr=1e-3), torch.optim.AdamW(others, lr=1e-3)
        steps([ours, torchs], 3, parameters, others)
        assert all(map(torch.equal, parameters, others))


def test_bfloat16_moments_keep_their_mean() -> None:
    """Rounded to nearest, the second moment would stand still: a change of 1/1000 is below the step of 1/256."""
    narrow, wide = pairs()
    settings: Any = {"lr": 1e-5, "betas": (0.9, 0.999), "weight_decay": 0.0}
    ours, torchs = AdamWBF16(narrow, moments="bfloat16", **settings), torch.optim.AdamW(wide, **settings)
    start = [parameter.detach().clone() for parameter in wide]
    steps([ours, torchs], 300, narrow, wide)
    for (parameter, master), expected, first in zip(ours.masters(), wide, start, strict=True):
        if expected.numel() < 100:
            continue
        moved = (master - first).norm() / (expected - first).norm()
        assert 0.99 <= moved <= 1.01, moved
        mean = ours.state[parameter]["exp_avg_sq"].abs().float().mean() / torchs.state[expected]["exp_avg_sq"].mean()
        assert 0.99 <= mean <= 1.01, mean
        assert ours.state[parameter]["exp_avg"].dtype == torch.bfloat16


def test_stochastic_rounding_keeps_what_lies_between() -> None:
    value = torch.full((200_000,), 1 + 2**-10)
    rounded = torch.empty_like(value, dtype=torch.bfloat16)
    round_stochastically(
        value, noise(place_of(value, [0]), 0, len(value), key_of(0, 1), torch.tensor(1.0), value.device)[0], rounded
    )
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
    assert rounded.float().mean().item() == pytest.approx(1 + 2**-10, abs=5e-5)
    exact = torch.tensor([1.0, -2.5, 0.0, float("inf")])
    round_stochastically(
        exact, torch.full((4,), 0xFFFF, dtype=torch.int32), kept := torch.empty(4, dtype=torch.bfloat16)
    )
    assert torch.equal(kept.float(), exact)


def test_random_bits_belong_to_the_place_in_the_whole() -> None:
    whole = torch.empty(6, 8, 10)
    key, step = key_of(7, 3), torch.tensor(5.0)
    bits = [part.view(6, 8, 10) for part in noise(place_of(whole, [0, 1, 2]), 0, 480, key, step, whole.device)]
    assert not torch.equal(*bits) and all(0 <= part.min() and 60_000 < part.max() < 65_536 for part in bits)
    # A part of rows, of the second, of the last dimension and of two at once, as (size, offset, stride).
    for rows, cut in {
        ((3, 2, 80), (80, 0, 1)): (slice(2, 5), slice(None), slice(None)),
        ((6, 0, 80), (3, 4, 10), (10, 0, 1)): (slice(None), slice(4, 7), slice(None)),
        ((6, 0, 80), (8, 0, 10), (4, 6, 1)): (slice(None), slice(None), slice(6, 10)),
        ((2, 4, 80), (8, 0, 10), (5, 5, 1)): (slice(4, 6), slice(None), slice(5, 10)),
    }.items():
        size = bits[0][cut].numel()
        halves = [
            noise(rows, start, stop, key, step, whole.device) for start, stop in ((0, size // 3), (size // 3, size))
        ]
        for number, part in enumerate(bits):
            assert torch.equal(torch.cat([half[number] for half in halves]), part[cut].reshape(-1))
    # Another order of memory, the same places.
    turned = noise(place_of(whole, [2, 0, 1]), 0, 480, key, step, whole.device)[0]
    assert torch.equal(turned.view(10, 6, 8), bits[0].permute(2, 0, 1))
    for other in ((key, step + 1), (key_of(7, 4), step), (key_of(8, 3), step)):
        assert not torch.equal(bits[0].flatten(), noise(place_of(whole, [0, 1, 2]), 0, 480, *other, whole.device)[0])


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("through_dcp", [False, True])
def test_a_loaded_state_goes_on_bit_for_bit(moments: Any, through_dcp: bool) -> None:
    straight, first = nn.ParameterList(pairs()[0]), nn.ParameterList(pairs()[0])
    one, two = (AdamWBF16(parameters, lr=1e-5, moments=moments) for parameters in (straight, first))
    steps([one, two], 20, list(straight), list(first))
    second = nn.ParameterList([nn.Parameter(parameter.detach().clone()) for parameter in first])
    # The settings are the checkpoint's too.
    again = AdamWBF16(second, lr=1.0, moments=moments)
    if through_dcp:
        set_optimizer_state_dict(second, again, get_optimizer_state_dict(first, two))
    else:
        again.load_state_dict(two.state_dict())
    steps([one, again], 20, list(straight), list(second), first=20)
    for old, new in zip(straight, second, strict=True):
        assert torch.equal(old, new)
        for name, value in one.state[old].items():
            assert value.dtype == again.state[new][name].dtype and torch.equal(value, again.state[new][name]), name
    # What was loaded is a copy.
    assert not torch.equal(two.state[first[0]]["exp_avg"], again.state[second[0]]["exp_avg"])


def test_a_state_of_another_adamw_is_taken_with_its_weights_as_masters() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        wide = [nn.Parameter(parameter.detach().to(dtype)) for parameter in pairs()[1]]
        theirs = torch.optim.AdamW(wide, lr=1e-3)
        steps([theirs], 3, wide)
        narrow = [nn.Parameter(parameter.detach().bfloat16()) for parameter in wide]
        ours = AdamWBF16(narrow)
        ours.load_state_dict(theirs.state_dict())
        for parameter, master in ours.masters():
            assert torch.equal(master, parameter.detach().float())
            assert ours.state[parameter]["exp_avg"].dtype == torch.float32
        before = [parameter.detach().clone() for parameter in narrow]
        # What is smaller than a bfloat16 can take is kept.
        ours.param_groups[0]["lr"] = 1e-6
        steps([ours], 1, narrow, first=3)
        assert (narrow[0] == before[0]).float().mean() > 0.9
        assert not any(torch.equal(master, parameter.detach().float()) for parameter, master in ours.masters())


def test_masters_become_float32_weights_and_halves_again() -> None:
    narrow, _ = pairs()
    ours = AdamWBF16(narrow, lr=1e-5)
    steps([ours], 5, narrow)
    names = [f"weight{number}" for number in range(len(narrow))]
    masters = dict(zip(names, (master for _, master in ours.masters()), strict=True))
    states = {name: {**ours.state[parameter]} for name, parameter in zip(names, narrow, strict=True)}
    # Loaded into float32 weights, as a checkpoint's bfloat16 values are.
    loaded = {name: parameter.detach().float() for name, parameter in zip(names, narrow, strict=True)}
    assert take_masters(states, loaded, ours) == {}
    taken = take_masters(states, loaded, torch.optim.AdamW(narrow))
    assert taken.keys() == masters.keys() and all(torch.equal(taken[name], masters[name]) for name in names)
    assert not any("remainder" in state or state["exp_avg_sq"].signbit().any() for state in states.values())
    fresh = {name: nn.Parameter(torch.zeros_like(parameter)) for name, parameter in zip(names, narrow, strict=True)}
    give_halves(states, fresh, AdamWBF16(fresh.values()), taken.get)
    for name, parameter in zip(names, narrow, strict=True):
        assert torch.equal(fresh[name], parameter) and torch.equal(master_of(fresh[name], states[name]), masters[name])
    give_halves(states := {"weight0": {"exp_avg_sq": torch.zeros(1)}}, fresh, AdamWBF16(fresh.values()), lambda _: None)
    assert "remainder" not in states["weight0"]


def test_memory_of_an_update_is_that_of_a_bucket() -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            for tensor in found if isinstance(found, (list, tuple)) else [found]:
                if isinstance(tensor, Tensor):
                    self.bytes = max(self.bytes, tensor.untyped_storage().nbytes() if tensor._base is None else 0)
            return found

    parameter = nn.Parameter(torch.zeros(2**20, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    optimizer = AdamWBF16([parameter], bucket_mib=0.5)
    optimizer.step()
    with Largest() as seen:
        optimizer.step()
    # The parameter's and the state's own storages come out of in-place operations; nothing new is larger than a bucket.
    own = {tensor.untyped_storage().nbytes() for tensor in (parameter, *optimizer.state[parameter].values())}
    assert seen.bytes <= max(own)


def test_mistakes_are_told() -> None:
    parameter = [nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))]
    with pytest.raises(ConfigError, match="amsgrad=True. Leave it out"):
        AdamWBF16(parameter, amsgrad=True)
    with pytest.raises(ConfigError, match=r"moments='8bit' is not one of \['float32', 'bfloat16'\]"):
        AdamWBF16(parameter, moments="8bit")
    with pytest.raises(ConfigError, match="bucket_mib=0 is not above 0"):
        AdamWBF16(parameter, bucket_mib=0)
    with pytest.raises(ConfigError, match="there are float16 ones"):
        AdamWBF16([nn.Parameter(torch.zeros(2, dtype=torch.float16))])
    embedding = nn.Embedding(4, 2, sparse=True, dtype=torch.bfloat16)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="takes dense gradients"):
        AdamWBF16(embedding.parameters()).step()
