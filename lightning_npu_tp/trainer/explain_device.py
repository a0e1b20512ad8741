"""Errors of the device while a trainer call runs: what they mean, where they happened, and what would have fitted.

torch_npu, HCCL and CUDA raise RuntimeErrors that hold codes; the launcher hands them here, around a whole
trainer call, and raises what comes back from the original. The table of codes is `devices/fault_table.py`, a failed
collective `explain_collective.py`'s, the arithmetic of memory `estimates/what_fits.py`'s. Training pays nothing: all
is read from the error, its traceback and the trainer when it is too late for anything else.
"""

from __future__ import annotations

import os
import socket
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lightning_npu_tp.devices.fault_table import MEMORY, Fault
from lightning_npu_tp.devices.fault_text import called, explain
from lightning_npu_tp.devices.hccl_settings import ALLOC_CONF, OTHER_ALLOC_CONF
from lightning_npu_tp.devices.process_log import logged_errors
from lightning_npu_tp.errors import CommunicationError, DeviceFault, LightningNPUTPError, RankFailure
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
from lightning_npu_tp.parallel.plan import match_plan
from lightning_npu_tp.parallel.tensor_region import local
from lightning_npu_tp.trainer.explain_collective import frames_of

_REMEDIES = "By arithmetic any one of these would fit"
_ALLOCATORS = (ALLOC_CONF, OTHER_ALLOC_CONF, "PYTORCH_CUDA_ALLOC_CONF")
_LIBRARIES = Path(sysconfig.get_paths()["purelib"])
# On a CPU a broken pipe is that of `train.py | head`, or of a data loader.
_ON_CARDS_ONLY = ("BrokenPipe",)


class OutOfMemory(DeviceFault, torch.OutOfMemoryError):
    """The device's memory is full; says what holds it and what would fit."""


def explain_device_error(error: BaseException, trainer: Any = None) -> LightningNPUTPError | None:
    """The error to raise from this one, or None for an error without a known code.

    trainer: whose call it was; its strategy tells the rank, its module and optimizers what holds the memory.
    Returns a CommunicationError for a fault that only says that another rank is gone or late.
    """
    if isinstance(error, LightningNPUTPError):
        return None
    text = str(error)
    fault = explain(f"{type(error).__name__}: {text}" if isinstance(error, ConnectionError) else text)
    logged = ""
    if fault is not None and fault.code.startswith("ERR"):
        # torch_npu's own code says that something failed; what, CANN has perhaps written down.
        logged = logged_errors(os.getpid())
        fault = explain(f"{text}\n{logged}") or fault
    strategy = getattr(trainer, "strategy", None)
    on_cpu = getattr(getattr(strategy, "root_device", None), "type", "cpu") == "cpu"
    if fault is None or (on_cpu and fault.code in _ON_CARDS_ONLY):
        return None
    operation = called(text) or _place(error.__traceback__)
    message = f"{operation} failed on rank {getattr(strategy, 'global_rank', 0)} of host {socket.gethostname()}. "
    if fault.lost_peer:
        return CommunicationError(message + fault.sentence())
    if fault not in MEMORY:
        return DeviceFault(message + fault.sentence() + (f"\n{logged}" if logged else ""))
    return OutOfMemory(message + _about_memory(fault, text, error, trainer))


def may_hang(error: BaseException) -> bool:
    """Whether, after this error, asking the device for anything may raise or never return. Full memory is none."""
    return isinstance(error, DeviceFault | CommunicationError | RankFailure) and not isinstance(error, OutOfMemory)


def _about_memory(fault: Fault, text: str, error: BaseException, trainer: Any) -> str:
    told = read_numbers(text)
    try:
        story = _memory_story(told, error, trainer)
    except Exception as problem:
        # Whatever state the run is in, the out-of-memory error must be told.
        story = f"(What holds the memory could not be read: {type(problem).__name__}: {problem}.)"
    first_line = text.strip().splitlines()[0] if text.strip() else fault.title
    # Computed remedies make those of the table superfluous.
    meaning = "See docs/troubleshooting.md." if _REMEDIES in story else fault.sentence()
    return " ".join(part for part in (f"{first_line.rstrip('.')}.", story, meaning) if part)


def _memory_story(told: Told, error: BaseException, trainer: Any) -> str:
    """What holds the memory, and what would fit; as far as it can be known."""
    module = getattr(trainer, "lightning_module", None)
    if module is None:
        return ""
    weights = _bytes(parameter for parameter in module.parameters())
    gradients = _bytes(p.grad for p in module.parameters() if p.grad is not None)
    states = _bytes(_optimizer_tensors(trainer))
    parts = [f"weights {in_words(weights)}", f"gradients {in_words(gradients)}", f"optimizer states {in_words(states)}"]
    rest = max(0, told.allocated - weights - gradients - states) if told.allocated is not None else 0
    if told.allocated is not None:
        parts.append(f"activations and buffers {in_words(rest)}")
    sentences = [f"This rank held: {', '.join(parts)}."]
    run = describe_run(trainer, _batch_shape(error.__traceback__), seen=rest + (told.requested or 0))
    if told.in_pieces and not _expandable() and (run is None or told.usable is None or needed(run) <= told.usable):
        sentences.append(
            "The allocator's cache was large enough, but in pieces: strategy.hccl.expandable_segments=true on Ascend, "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True on CUDA, may be all that it takes."
        )
    if run is None or told.usable is None:
        return " ".join(sentences)
    if run.batch:
        sentences.append(f"The batch had {run.batch} sequences of {run.length} tokens.")
    standing = kept_for_the_run(run)
    if standing > told.usable:
        sentences.append(
            f"Weights, gradients and optimizer states alone take {in_words(standing)} in this layout, of "
            f"{in_words(told.usable)}: no batch is small enough."
        )
    found = suggestions(run, told.usable)
    if found:
        sentences.append(f"{_REMEDIES}: {'; '.join(found)}.")
    elif run.batch:
        sentences.append("By arithmetic no single setting would make it fit; combine them.")
    return " ".join(sentences)


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
    if trainer.optimizers and not isinstance(trainer.optimizers[0], torch.optim.Adam | torch.optim.AdamW):
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


def _place(traceback: TracebackType | None) -> str:
    """Function, file and line of the innermost frame that is not an installed library's."""
    own = [frame for frame in frames_of(traceback) if not Path(frame[0].f_code.co_filename).is_relative_to(_LIBRARIES)]
    if not own:
        return "A call of the device"
    frame, line = own[-1]
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{line})"


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
