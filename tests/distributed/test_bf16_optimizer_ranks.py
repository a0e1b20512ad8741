"""AdamWBF16 under the strategy: the same masters as float32 training has, in every layout, and out of every checkpoint.

Catches masters that a layout changes, random bits that depend on it, a checkpoint that loses the bits below bfloat16 on
its way into another layout, into float32 or back, a precision for which the optimizer is not made, and a run whose
updates are lost without a word.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from test_strategy import Module, data, trainer
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.optim import AdamWBF16
from lightning_npu_tp.optim.noise import noise, place_of

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor 2": {"tensor_parallel_size": 2},
    "tensor 2, slices": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "data 2 shard": {"tensor_parallel_size": 1},
    "data 2 replicate": {"tensor_parallel_size": 1, "data_parallel": "replicate"},
    "data 2, tensor 2, expert 4": {"tensor_parallel_size": 2, "expert_parallel_size": 4},
}
# BF16_STEPS=200 was run when this was written, in seven minutes: processors without bfloat16 instructions are slow.
STEPS = int(os.environ.get("BF16_STEPS", "30"))
SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Narrow(Module):
    """Trains with AdamWBF16 and keeps its masters, whole, while they can still be gathered."""

    def configure_optimizers(self) -> Any:
        return AdamWBF16(self.parameters(), **SETTINGS | self.options)

    def on_train_end(self) -> None:
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        optimizer = self.trainer.optimizers[0]
        pairs = (
            optimizer.masters() if isinstance(optimizer, AdamWBF16) else ((p, p.detach()) for p in self.parameters())
        )
        self.masters = {names[id(p)]: m.full_tensor() if isinstance(m, DTensor) else m for p, m in pairs}


class Wide(Narrow):
    """The same model in float32."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), **SETTINGS)


class Float32AdamW(Callback):
    """torch's AdamW over float32 copies, fed with the gradients of the narrow weights."""

    def on_train_start(self, run: Any, module: Any) -> None:
        self.copies = {name: torch.nn.Parameter(local(p.detach()).float()) for name, p in module.named_parameters()}
        fused = run.optimizers[0].param_groups[0]["fused"]
        self.optimizer = torch.optim.AdamW(self.copies.values(), fused=fused, **SETTINGS)

    def on_before_optimizer_step(self, run: Any, module: Any, optimizer: Any) -> None:
        for name, parameter in module.named_parameters():
            self.copies[name].grad = None if parameter.grad is None else local(parameter.grad).float()
        self.optimizer.step()


def beside_float32(rank: int, world_size: int, layout: dict[str, Any], num_steps: int) -> tuple[int, int]:
    oracle, module = Float32AdamW(), Narrow()
    run = trainer(
        NPUTensorParallelStrategy(init_seed=0, **layout), devices=world_size, precision="bf16-true", max_epochs=-1,
        max_steps=num_steps, callbacks=[oracle],
    )  # fmt: skip
    run.fit(module, data(16))
    same = total = 0
    optimizer = run.optimizers[0]
    masters = {id(parameter): master for parameter, master in optimizer.masters()}
    for name, parameter in module.named_parameters():
        copy = oracle.copies[name].detach()
        same += int((local(masters[id(parameter)]) == copy).sum() + (local(parameter) == copy.bfloat16()).sum())
        total += 2 * copy.numel()
    return same, total


@pytest.mark.parametrize(
    ("layout", "num_steps"), [*((name, STEPS) for name in LAYOUTS), ("tensor 2, slices", 12), ("data 2 shard", 12)]
)
def test_masters_are_those_of_float32_training_in_every_layout(on_ranks: Any, layout: str, num_steps: int) -> None:
    world = 4 if "expert 4" in layout else 2
    for same, total in on_ranks(beside_float32, world, LAYOUTS[layout], num_steps, backend=None, timeout=300):
        assert same == total > 0


def fitted(module: Module, layout: str, precision: str, world: int, **options: Any) -> Any:
    run = trainer(
        NPUTensorParallelStrategy(init_seed=0, **LAYOUTS[layout]), devices=world, precision=precision, **options
    )
    path = module.options.pop("resume", None)
    run.fit(module, data(), ckpt_path=path)
    return run


class Stands(Callback):
    """Ends the run before its first step."""

    def on_train_start(self, run: Any, module: Any) -> None:
        run.should_stop = True
        module.on_train_end()


def exchanged(rank: int, world_size: int, folder: str, moments: str) -> dict[str, Any]:
    """Masters of a run, and those of what goes on from its checkpoint in other layouts and precisions."""
    first = Narrow(moments=moments)
    fitted(first, "tensor 2", "bf16-true", world_size, max_epochs=1).save_checkpoint(f"{folder}/narrow.ckpt")
    found = {"first": first.masters}
    for layout in ("data 2 shard", "data 2 replicate"):
        found[layout] = loaded(Narrow(moments=moments, resume=f"{folder}/narrow.ckpt"), layout, "bf16-true", world_size)
    wide = Wide(resume=f"{folder}/narrow.ckpt")
    found["float32"] = loaded(wide, "data 2 shard", "32-true", world_size, save=f"{folder}/wide.ckpt")
    states = [local(value) for state in wide.trainer.optimizers[0].state.values() for value in state.values()]
    assert all(value.dtype == torch.float32 and (value.ndim < 1 or value.isfinite().all()) for value in states)
    assert not any("remainder" in state for state in wide.trainer.optimizers[0].state.values())
    back = Narrow(moments=moments, resume=f"{folder}/wide.ckpt")
    found["back"] = loaded(back, "tensor 2", "bf16-true", world_size)
    straight = Narrow(moments=moments)
    fitted(straight, "tensor 2", "bf16-true", world_size, max_epochs=2)
    again = Narrow(moments=moments, resume=f"{folder}/narrow.ckpt")
    fitted(again, "tensor 2", "bf16-true", world_size, max_epochs=2)
    found["straight"], found["resumed"] = straight.masters, again.masters
    return found


def loaded(module: Module, layout: str, precision: str, world: int, save: str | None = None) -> dict[str, Tensor]:
    run = fitted(module, layout, precision, world, max_epochs=2, callbacks=[Stands()])
    if save:
        run.save_checkpoint(save)
    return module.masters


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_masters_come_out_of_a_checkpoint_bit_for_bit(on_ranks: Any, tmp_path: Path, moments: str) -> None:
    for found in on_ranks(exchanged, 2, str(tmp_path), moments, backend=None, timeout=300):
        first = found["first"]
        assert any(not torch.equal(master, master.bfloat16().float()) for master in first.values())
        for what in ("data 2 shard", "data 2 replicate", "float32", "back"):
            assert all(torch.equal(found[what][name], master) for name, master in first.items()), what
        assert all(torch.equal(found["resumed"][name], master) for name, master in found["straight"].items())


def bits_of_places(rank: int, world_size: int) -> bool:
    mesh, step, device = init_device_mesh("cpu", (world_size,)), torch.tensor(3.0), torch.device("cpu")
    same = []
    for shape in ((7, 5, 6), (4, 3), (5,)):
        order = list(range(len(shape)))
        whole = torch.empty(shape)
        bits = noise(place_of(whole, order), 0, whole.numel(), 11, step, device)[0].view(shape)
        for dim in order:
            part = distribute_tensor(whole, mesh, [Shard(dim)])
            held = distribute_tensor(bits, mesh, [Shard(dim)]).to_local()
            found = noise(place_of(part, order), 0, held.numel(), 11, step, device)[0]
            same.append(torch.equal(found, held.reshape(-1)))
    return all(same)


def test_random_bits_belong_to_the_place_in_the_whole_on_every_rank(on_ranks: Any) -> None:
    assert on_ranks(bits_of_places, 2) == [True, True]


class Plain(Narrow):
    """bfloat16 weights under torch's own AdamW."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), **SETTINGS | self.options)


def told(rank: int, world_size: int) -> dict[str, list[str]]:
    found = {}
    runs: dict[str, tuple[Module, str]] = {
        "slow": (Plain(lr=1e-6), "bf16-true"),
        "fast": (Plain(lr=1e-2), "bf16-true"),
        "standing": (Plain(lr=0.0), "bf16-true"),
        "kept": (Narrow(lr=1e-6), "bf16-true"),
        "wide": (Plain(lr=1e-6), "32-true"),
    }
    for name, (module, precision) in runs.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted(module, "tensor 2", precision, world_size, max_epochs=2)
        found[name] = [str(warning.message) for warning in caught if "were lost" in str(warning.message)]
    with pytest.raises(ConfigError, match="AdamWBF16 keeps the lost.*trainer.precision=bf16-mixed keeps the weights"):
        fitted(Narrow(), "tensor 2", "bf16-mixed", world_size)
    return found


def test_lost_updates_are_told_once_with_their_share(on_ranks: Any) -> None:
    found = on_ranks(told, 2, backend=None, timeout=120)
    assert [len(lines) for lines in found[0].values()] == [1, 0, 0, 0, 0]
    assert "In the first 5 steps 9" in found[0]["slow"][0] and "optimizer=adamw_bf16" in found[0]["slow"][0]
    assert not any(found[1].values())
