"""What a sharded model computes, in the shape of `ReferenceStep`: the other side of every parity test and of `prove`.

`train_sharded` runs on every rank: it converts the reference model for a layout, trains a few AdamW steps
on this data rank's share of the batches and gathers what one process would have. `compare` holds both
against each other, number by number.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_npu_tp import kernels
from lightning_npu_tp.checkpoint import training_state
from lightning_npu_tp.convert.convert import Options, check_sizes, conversion_of, convert
from lightning_npu_tp.convert.data_parallel import reduce_gradients
from lightning_npu_tp.devices import device as devices
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.models.families.family import ModelFamily
from lightning_npu_tp.models.families.registry import FAMILIES
from lightning_npu_tp.models.layers.sharded_causal_lm import ShardedDecoder
from lightning_npu_tp.models.moe.bias import clear_pending
from lightning_npu_tp.parallel.clipping import clip_grad_norm_, total_grad_norm
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes
from lightning_npu_tp.parallel.plan import chunk_bounds
from lightning_npu_tp.tools.testing.models import (
    BatchAnswer,
    ReferenceStep,
    counted_tokens,
    reference_model,
    reference_step,
)
from lightning_npu_tp.tools.testing.reference import relative_difference

# The one of `Training.kinds` whose loss has the balance losses in it.
BALANCE = "balance losses"


@dataclass(frozen=True, kw_only=True)
class Training:
    """A short training run, alike for one process and for any layout.

    config:        transformers config of the model; `reference_model` builds it.
    batches:       global micro-batches of each optimizer step, as `random_batch` makes them.
    kinds:         global batches by name, each of which is answered by itself before the first step.
    clip_norm:     None does not clip.
    reshard:       save a checkpoint at the end, load it into another layout and compare.
    router_losses: add the balance losses, each micro-batch's by its share of the tokens. Not part of what
                   transformers computes: compare with one process of ours.
    """

    config: Any
    batches: Sequence[Mapping[str, Tensor]]
    kinds: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    steps: int = 3
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    clip_norm: float | None = None
    router_losses: bool = False
    reshard: bool = False

    @property
    def tokens(self) -> int:
        """Labels that count in one optimizer step."""
        return sum(counted_tokens(batch) for batch in self.batches)


@dataclass
class ShardedRun:
    """One rank's view of a sharded run; everything is gathered, so that it compares with one process.

    fields as in ReferenceStep; logits are those of this data rank's rows, `rows` says which (first, last)
    of each micro-batch.
    kinds:             answers for Training.kinds, their logits of this data rank's rows.
    resharded:         with Training.reshard, the worst relative difference of weights and optimizer states that came
                       back in another layout, and where.
    tokens_per_expert: [layers, experts], summed over all ranks, of the first step.
    """

    kinds: dict[str, BatchAnswer] = field(default_factory=dict)
    rows: list[tuple[int, int]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    grad_norm: Tensor | None = None
    parameters: dict[str, Tensor] = field(default_factory=dict)
    tokens_per_expert: Tensor | None = None
    resharded: tuple[float, str] | None = None


CPU = torch.device("cpu")


def open_group(device_type: str, rank: int, timeout: float) -> torch.device:
    """Bind this process to its device and start the default process group there; the environment names the others.

    timeout: of its collectives, in seconds. Returns the device.
    """
    device = CPU if device_type == "cpu" else torch.device(device_type, rank)
    devices.torch_module(device_type).set_device(device)
    dist.init_process_group(devices.backend_for(device_type), timeout=timedelta(seconds=timeout))
    return device


def whole(tensor: Tensor) -> Tensor:
    """A DTensor gathered, anything else as it is; on the CPU."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def sharded_model(
    config: Any,
    layout: Layout,
    options: Options | None = None,
    *,
    dtype: torch.dtype | None = None,
    families: Sequence[ModelFamily] = (),
    device: torch.device = CPU,
    chosen: kernels.Kernels | None = None,
) -> tuple[Any, Meshes]:
    """The reference model converted for `layout`; every rank of the default group calls it.

    dtype: None keeps float64. families: beside the built-in ones. device: of this rank. chosen: other kernels than
    those of the device.
    """
    # Other weights on the other ranks: rank 0's must reach them.
    model = reference_model(config, seed=0 if dist.get_rank() == 0 else 99)
    meshes = Meshes.build(layout, device.type)
    convert(
        model,
        meshes=meshes,
        groups=Groups(meshes),
        kernels=chosen or kernels.select(device.type),
        device=device,
        families=families,
        dtype=dtype,
        seed=0,
        options=options,
    )
    return model, meshes


def own_rows(batch: Mapping[str, Tensor], rank: int, ranks: int) -> tuple[tuple[int, int], dict[str, Tensor]]:
    """A data rank's sequences of a global batch, unevenly where they do not divide; which ones, and the tensors."""
    first, last = chunk_bounds(len(batch["input_ids"]), rank, ranks)
    return (first, last), {name: value[first:last] for name, value in batch.items()}


def train_alone(training: Training) -> ReferenceStep:
    """The training by transformers itself, without any sharding, in this process and in float64."""
    return reference_step(
        reference_model(training.config),
        training.batches,
        steps=training.steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        clip_norm=training.clip_norm,
    )


def train_sharded(
    rank: int,
    world_size: int,
    training: Training,
    layout: Layout,
    options: Options | None = None,
    *,
    dtype: torch.dtype | None = None,
    families: Sequence[ModelFamily] = (),
    device: torch.device = CPU,
) -> ShardedRun:
    """Train on this rank's part of `layout`; see `Training`, `ShardedRun` and `sharded_model`."""
    # It says of every gathered parameter that two gathers are slower than one; nothing here is in a hurry.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    seen: Counter[str] = Counter()
    model, meshes = sharded_model(
        training.config,
        layout,
        options,
        dtype=dtype,
        families=families,
        device=device,
        chosen=_watched(kernels.select(device.type), seen),
    )
    for module in model.modules():
        if isinstance(module, ShardedDecoder):
            module.register_forward_hook(partial(_note_slices, seen), with_kwargs=True)
    parameters = dict(model.named_parameters())
    optimizer = _optimizer(model, training)
    run, blocks = ShardedRun(), moe_blocks(model)
    wide = torch.float64 if "64-true" in devices.supported_precisions(device.type) else torch.float32

    def backward(batch: Mapping[str, Tensor], tokens: int, balance: bool) -> tuple[Tensor, Tensor]:
        """This data rank's part of a batch: its loss, of which the mean over data ranks is the whole, and logits."""
        _, mine = own_rows(batch, rank // layout.tensor, layout.data)
        mine = {name: value.to(device) for name, value in mine.items()}
        # Gradients are averaged over the data ranks.
        output = model(**mine, num_items_in_batch=tokens / layout.data, gather_logits=True)
        calls = seen.total()
        total = output.loss
        if balance and output.aux_loss is not None:
            total = total + output.aux_loss * counted_tokens(mine) / (tokens / layout.data)
        total.backward()
        if seen.total() > calls:
            seen["recomputed"] += 1
        return total.detach().to(wide), output.logits.detach().cpu()

    def over_data(loss: Tensor) -> Tensor:
        if layout.data > 1:
            dist.all_reduce(loss, group=meshes.data_group)
        return (loss / layout.data).cpu()

    for name, batch in training.kinds.items():
        seen.clear()
        reduce_gradients(model, True)
        loss, logits = backward(batch, counted_tokens(batch), name == BALANCE)
        gradients = {parameter: whole(gradient(p)).clone() for parameter, p in parameters.items()}
        run.kinds[name] = BatchAnswer(over_data(loss), logits, gradients, frozenset(seen))
        optimizer.zero_grad()
    clear_pending(blocks)
    for step in range(training.steps):
        optimizer.zero_grad()
        loss = torch.zeros((), dtype=wide, device=device)
        for number, batch in enumerate(training.batches):
            reduce_gradients(model, number == len(training.batches) - 1)
            part, logits = backward(batch, training.tokens, training.router_losses)
            loss += part
            if step == 0:
                run.rows.append(own_rows(batch, rank // layout.tensor, layout.data)[0])
                run.logits.append(logits)
        run.losses.append(over_data(loss))
        if step == 0:
            run.gradients = {name: whole(gradient(p)).clone() for name, p in parameters.items()}
            run.grad_norm = total_grad_norm(list(parameters.values())).cpu()
            if blocks:
                counts = torch.stack([block.pending_tokens_per_expert for block in blocks])
                dist.all_reduce(counts)
                run.tokens_per_expert = counts.cpu()
        if training.clip_norm is not None:
            clip_grad_norm_(list(parameters.values()), training.clip_norm)
        optimizer.step()
    run.parameters = {name: whole(p.detach()) for name, p in parameters.items()}
    if training.reshard:
        other = other_layout(model, layout, families)
        copy, _ = sharded_model(training.config, other, dtype=dtype, families=families, device=device)
        run.resharded = _through_a_checkpoint(model, optimizer, copy, _optimizer(copy, training))
    dist.barrier()
    return run


def _note_slices(seen: Counter[str], _: Any, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
    """Note "sliced" where a decoder's result is a part of the sequences that went in."""
    if output.last_hidden_state.shape[1] < keywords["input_ids"].shape[1]:
        seen["sliced"] += 1


def _watched(chosen: kernels.Kernels, seen: Counter[str]) -> kernels.Kernels:
    """The same kernels; attention notes in `seen` whether it was "causal" (without a mask) or "masked"."""

    def attend(*tensors: Tensor, mask: Tensor | None, **settings: Any) -> Tensor:
        seen["causal" if mask is None else "masked"] += 1
        return chosen.attend(*tensors, mask=mask, **settings)

    return replace(chosen, attend=attend)


def _optimizer(model: Any, training: Training) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, foreach=False
    )


def other_layout(model: Any, layout: Layout, families: Sequence[ModelFamily] = ()) -> Layout:
    """A layout of as many ranks that splits a converted model in another way, where there is one."""
    report = conversion_of(model)
    assert report is not None
    family = next(family for family in (*families, *FAMILIES) if family.name == report.family)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    world = layout.world
    for sizes in ((1, world, world), (world, 1, world), (world, 1, 1)):
        other = Layout(*sizes)
        try:
            check_sizes(family, model.config, report.rules, shapes, other)
        except ConfigError:
            continue
        if other != layout:
            return other
    return layout


def _through_a_checkpoint(model: Any, optimizer: Any, copy: Any, its_optimizer: Any) -> tuple[float, str]:
    """Save one, load the other, and compare all tensors; the folder is removed."""
    is_main = dist.get_rank() == 0
    place: list[Any] = [tempfile.mkdtemp() if is_main else None]
    dist.broadcast_object_list(place)
    path = Path(place[0]) / "checkpoint"
    try:
        states = [training_state.optimizer_state(model, optimizer)]
        saved = {"state_dict": training_state.model_state(model), "optimizer_states": states}
        training_state.save_sharded(saved, path, is_main=is_main)
        dist.barrier()
        training_state.load(path, copy, [its_optimizer], strict=True, weights_only=None)
        dist.barrier()
    finally:
        if is_main:
            shutil.rmtree(place[0])
    worst = (0.0, "weights")
    loaded = dict(copy.named_parameters())
    for name, parameter in model.named_parameters():
        pairs = {name: (loaded[name], parameter)}
        for key, value in optimizer.state[parameter].items():
            pairs[f"{key} of {name}"] = (its_optimizer.state[loaded[name]][key], value)
        for what, (actual, wanted) in pairs.items():
            worst = max(worst, (relative_difference(whole(actual), whole(wanted)), what))
    return worst


def moe_blocks(model: Any) -> list[Any]:
    """The converted mixture-of-experts blocks inside `model`, in its order."""
    return [module for module in model.modules() if hasattr(module, "pending_tokens_per_expert")]


def gradient(parameter: Tensor) -> Tensor:
    """The parameter's gradient; zero where no token reached it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def compare(run: ShardedRun, expected: ReferenceStep | ShardedRun, training: Training) -> dict[str, float]:
    """Relative difference of every number of a rank's run to one process's, by what it is.

    expected: transformers' answer, or that of a world of one.

    Raises AssertionError for parameters that are missing or of another shape.
    """
    assert run.gradients.keys() == expected.gradients.keys()
    assert run.grad_norm is not None and expected.grad_norm is not None
    differences = {"clip norm": relative_difference(run.grad_norm, expected.grad_norm)}
    for step, (actual, wanted) in enumerate(zip(run.losses, expected.losses, strict=True)):
        differences[f"loss of step {step}"] = relative_difference(actual, wanted)
    for index, (actual, wanted, batch) in enumerate(zip(run.logits, expected.logits, training.batches, strict=True)):
        differences[f"logits {index}"] = _logits_difference(actual, wanted, batch, run.rows[index])
    for name, wanted in expected.gradients.items():
        differences[f"gradient of {name}"] = relative_difference(run.gradients[name], wanted)
    for name, wanted in expected.parameters.items():
        differences[f"{name} after {training.steps} steps"] = relative_difference(run.parameters[name], wanted)
    return differences


def _logits_difference(actual: Tensor, wanted: Tensor, batch: Mapping[str, Tensor], rows: tuple[int, int]) -> float:
    """actual: a data rank's `rows` (first, last) of `wanted`; padding is left out of the comparison."""
    first, last = rows
    seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()[first:last]
    return relative_difference(actual[seen], wanted[first:last][seen])


def compare_kind(
    actual: BatchAnswer, wanted: BatchAnswer, batch: Mapping[str, Tensor], data_rank: int, data_ranks: int
) -> dict[str, float]:
    """Relative difference of a rank's answer for one batch of `Training.kinds` to one process's, by what it is."""
    rows, _ = own_rows(batch, data_rank, data_ranks)
    differences = {
        "loss": relative_difference(actual.loss, wanted.loss),
        "logits": _logits_difference(actual.logits, wanted.logits, batch, rows),
    }
    for name, gradient_of in wanted.gradients.items():
        differences[f"gradient of {name}"] = relative_difference(actual.gradients[name], gradient_of)
    return differences
