"""Full memory: what this rank held, and what would have fitted by arithmetic.

Read from the allocator's error, the batch at work, the module and its optimizers; the arithmetic is
`estimates/what_fits.py`'s. That an error means full memory is known from the table, `explain_device.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lightning_npu_tp.devices.fault_table import Fault
from lightning_npu_tp.devices.hccl_settings import ALLOC_CONF, OTHER_ALLOC_CONF
from lightning_npu_tp.estimates.layer_memory import fused_by
from lightning_npu_tp.estimates.what_fits import (
    Run,
    Told,
    in_words,
    kept_for_the_run,
    needed,
    read_numbers,
    sizes_of,
    suggestions,
)
from lightning_npu_tp.kernels import select
from lightning_npu_tp.models.families.registry import FAMILIES, find_models
from lightning_npu_tp.optim import AdamWBF16
from lightning_npu_tp.parallel.plan import match_plan
from lightning_npu_tp.parallel.tensor_region import local
from lightning_npu_tp.trainer.explain_collective import frames_of

_ALLOCATORS = (ALLOC_CONF, OTHER_ALLOC_CONF, "PYTORCH_CUDA_ALLOC_CONF")


def about_memory(error: BaseException, fault: Fault, trainer: Any) -> str:
    """What held the memory and what would fit, as far as it can be known; the table's remedies where none is computed.

    trainer: with a lightning_module, if it has one yet.
    """
    found: list[str] = []
    sentences: list[str] = []
    if getattr(trainer, "lightning_module", None) is not None:
        try:
            told = read_numbers(str(error))
            held, rest = _held(told, trainer)
            sentences.append(held)
            run = describe_run(trainer, _batch_shape(error.__traceback__), seen=rest + (told.requested or 0))
            if told.in_pieces and not _expandable() and _fits_in_one_piece(run, told):
                sentences.append(
                    "The allocator's cache was large enough, but in pieces: strategy.hccl.expandable_segments=true on "
                    "Ascend, PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True on CUDA, may be all that it takes."
                )
            if run is not None and told.usable is not None:
                found = suggestions(run, told.usable)
                sentences += _against_what_is_needed(run, told.usable, found)
        except Exception as problem:
            # Whatever state the run is in, the out-of-memory error must be told.
            sentences = [f"(What holds the memory could not be read: {type(problem).__name__}: {problem}.)"]
            found = []
    return " ".join([*sentences, "See docs/troubleshooting.md." if found else fault.sentence()])


def _held(told: Told, trainer: Any) -> tuple[str, int]:
    """What this rank held, in words; and the bytes of activations and buffers among it, 0 if they are not known."""
    module = trainer.lightning_module
    weights = _bytes(parameter for parameter in module.parameters())
    gradients = _bytes(p.grad for p in module.parameters() if p.grad is not None)
    states = _bytes(_optimizer_tensors(trainer))
    parts = [f"weights {in_words(weights)}", f"gradients {in_words(gradients)}", f"optimizer states {in_words(states)}"]
    rest = max(0, told.allocated - weights - gradients - states) if told.allocated is not None else 0
    if told.allocated is not None:
        parts.append(f"activations and buffers {in_words(rest)}")
    return f"This rank held: {', '.join(parts)}.", rest


def _fits_in_one_piece(run: Run | None, told: Told) -> bool:
    """Whether memory in one piece would have been enough, or it is not known that it would not."""
    return run is None or told.usable is None or needed(run) <= told.usable


def _against_what_is_needed(run: Run, usable: int, found: list[str]) -> list[str]:
    """Sentences: the batch, whether any would fit, and the settings that would by arithmetic."""
    sentences = []
    if run.batch:
        sentences.append(f"The batch had {run.batch} sequences of {run.length} tokens.")
    standing = kept_for_the_run(run)
    if standing > usable:
        sentences.append(
            f"Weights, gradients and optimizer states alone take {in_words(standing)} in this layout, of "
            f"{in_words(usable)}: no batch is small enough."
        )
    if found:
        sentences.append(f"By arithmetic any one of these would fit: {'; '.join(found)}.")
    elif run.batch:
        sentences.append("By arithmetic no single setting would make it fit; combine them.")
    return sentences


def _expandable() -> bool:
    """Whether the allocator has been told to grow its pieces."""
    settings = (os.environ.get(name, "") for name in _ALLOCATORS)
    return any("expandable_segments:true" in setting.lower().replace(" ", "") for setting in settings)


def describe_run(trainer: Any, batch_shape: tuple[int, int] | None, *, seen: int = 0) -> Run | None:
    """What decides how much memory a rank of this trainer needs; None for a model without a plan or sizes.

    batch_shape: (sequences, tokens) of a micro-batch; None leaves them at zero.
    seen:        bytes of activations that were held.
    """
    strategy = trainer.strategy
    if not hasattr(strategy, "layout") or not hasattr(strategy, "options"):
        return None
    families = (*getattr(strategy, "_families", ()), *FAMILIES)
    found = next(find_models(trainer.lightning_module, families), None)
    if found is None:
        return None
    model: Any = found[1]
    family, sizes = found[2], sizes_of(model.config)
    if sizes is None:
        return None
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    # A plan has a rule for each name, also where a head is the embedding.
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    parameter = next(model.parameters())
    narrow = "bf16" in str(trainer.precision) or "16" in str(trainer.precision)
    tensors_per_parameter = 2
    if trainer.optimizers and isinstance(trainer.optimizers[0], AdamWBF16):
        tensors_per_parameter = trainer.optimizers[0].state_bytes // parameter.element_size()
    elif trainer.optimizers and not isinstance(trainer.optimizers[0], torch.optim.Adam | torch.optim.AdamW):
        states = trainer.optimizers[0].state.get(parameter, {})
        tensors_per_parameter = sum(isinstance(value, Tensor) and value.ndim > 0 for value in states.values())
    batch, length = batch_shape or (0, 0)
    chosen = select(strategy.root_device.type, getattr(strategy, "_kernel_overrides", None))
    return Run(
        sizes=sizes,
        shapes=shapes,
        rules=match_plan(family.plan(model.config), names, family=family.name),
        units=family.units(model.config),
        layout=strategy.layout,
        batch=batch,
        length=length,
        bytes_per_element=parameter.element_size(),
        activation_bytes=2 if narrow else parameter.element_size(),
        optimizer_states=tensors_per_parameter,
        data_parallel=strategy.options.data_parallel,
        sequence_parallel=strategy.options.sequence_parallel,
        recompute=strategy.options.recompute,
        accumulates=trainer.accumulate_grad_batches > 1,
        all_to_all=strategy.options.dispatch == "all_to_all",
        fused=fused_by(chosen.names),
        seen=seen,
    )


def _batch_shape(traceback: TracebackType | None) -> tuple[int, int] | None:
    """Shape of the token ids of the batch at work, from the frames that the error came through."""
    for frame, _ in frames_of(traceback):
        for value in frame.f_locals.values():
            tokens = value.get("input_ids") if isinstance(value, Mapping) else None
            if isinstance(tokens, Tensor) and tokens.ndim == 2:
                return int(tokens.shape[0]), int(tokens.shape[1])
    return None


def _optimizer_tensors(trainer: Any) -> Iterator[Tensor]:
    for optimizer in getattr(trainer, "optimizers", []):
        for states in optimizer.state.values():
            yield from (value for value in states.values() if isinstance(value, Tensor))


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of this rank's parts, each storage once; tensors without one, on the meta device, hold nothing."""
    parts = [local(tensor).detach() for tensor in tensors if not tensor.is_meta]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    return sum(storages.values())
