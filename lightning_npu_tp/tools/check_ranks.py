"""What the processes of `lightning-npu-tp check` do: convert, load and run a model, and transformers' own beside it.

`run_rank` builds the model without weights, shards it, reads this rank's slices from the files and runs a few forward
and backward passes on the device; no rank ever holds the whole. `run_alone` is transformers' own model of the same
folder in one process on the CPU. `compare` holds one against the other. What is known of a folder before any process
starts is `check_folder.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_npu_tp import kernels
from lightning_npu_tp.convert.convert import Options, conversion_of, convert, materialize_rest
from lightning_npu_tp.devices import device as devices
from lightning_npu_tp.errors import LightningNPUTPError
from lightning_npu_tp.parallel.clipping import total_grad_norm
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes
from lightning_npu_tp.tools.host_memory import HostPeak
from lightning_npu_tp.tools.prove import BOUNDS as PROVEN
from lightning_npu_tp.tools.testing.reference import float64_reference, relative_difference
from lightning_npu_tp.tools.testing.sharded import moe_blocks, open_group, own_rows
from lightning_npu_tp.weights.load import weights_from

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
# The first two as `prove`'s, and for its reasons. bfloat16 keeps 8 bits: every operation rounds by up to 4e-3, and
# near the middle between two experts a token goes to the other one, where one process in float32 did not. Weights
# that lie at the wrong place give 0.5 and more.
BOUNDS = {**PROVEN, "bfloat16": 0.2}
_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Request:
    """What every rank is asked to do; `batch` is the global one."""

    folder: str
    config: Any
    layout: Layout
    options: Options
    device_type: str
    dtype: str
    batch: Mapping[str, Tensor]
    timeout: float

    @property
    def tokens(self) -> int:
        """Number of labels that are predicted: all but the first of each sequence."""
        return self.batch["labels"][:, 1:].numel()


@dataclass(kw_only=True)
class RankAnswer:
    """One rank's numbers. Bytes of memory are the peak above what the process held before; seconds are per step.

    refused: why the model was not converted or filled; nothing else is told then.
    experts: (of a layer, of them on this rank). rows: which of the batch; logits: theirs, by the first tensor rank.
    """

    refused: LightningNPUTPError | None = None
    swapped: dict[str, int] = field(default_factory=dict)
    experts: tuple[int, int] | None = None
    parameters: int = 0
    local_bytes: int = 0
    tensors: int = 0
    ignored: dict[str, str] = field(default_factory=dict)
    read_bytes: int = 0
    read_seconds: float = 0.0
    loading_peak: int = 0
    peak: int = 0
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    loss: float = 0.0
    grad_norm: float = 0.0
    rows: tuple[int, int] = (0, 0)
    logits: Tensor | None = None

    def as_json(self) -> dict[str, Any]:
        """This rank's share and costs, for `--json`."""
        return {
            "local_experts": self.experts[1] if self.experts else None,
            "parameters": self.parameters,
            "weight_bytes": self.local_bytes,
            "read_bytes": self.read_bytes,
            "read_seconds": self.read_seconds,
            "peak_loading_bytes": self.loading_peak,
            "peak_bytes": self.peak,
            "forward_seconds": self.forward,
            "backward_seconds": self.backward,
        }


def run_rank(rank: int, world_size: int, request: Request) -> RankAnswer:
    """Convert, load, and run a few forward and backward passes; called without a process group."""
    runtime = devices.torch_module(request.device_type)
    device = open_group(request.device_type, rank, request.timeout + 10)
    answer = RankAnswer()
    with HostPeak() as peak:
        try:
            model, meshes = _loaded(request, device, answer)
        except LightningNPUTPError as error:
            # Every rank has the same, since the loader tells all of them.
            return RankAnswer(refused=error)
        answer.loading_peak = peak.grown
        for step in range(_STEPS):
            _step(request, model, meshes, answer, first=step == 0)
    counters = runtime.memory_stats(device)
    answer.peak = peak.grown if device.type == "cpu" else int(counters.get("allocated_bytes.all.peak", 0))
    return answer


def _loaded(request: Request, device: torch.device, answer: RankAnswer) -> tuple[Any, Meshes]:
    from transformers import AutoModelForCausalLM

    meshes = Meshes.build(request.layout, device.type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(request.config)
    weights_from(model, request.folder)
    convert(
        model,
        meshes=meshes,
        groups=Groups(meshes),
        kernels=kernels.select(device.type),
        device=device,
        dtype=DTYPES[request.dtype],
        seed=0,
        options=request.options,
    )
    materialize_rest(model, device=device, seed=0)
    model.to(device).train()
    report = conversion_of(model)
    assert report is not None and report.loaded is not None
    answer.swapped = dict(report.swapped)
    answer.parameters, answer.local_bytes = report.local_parameters, report.local_bytes
    answer.tensors, answer.ignored = report.loaded.tensors, report.loaded.ignored
    answer.read_bytes, answer.read_seconds = report.loaded.bytes, report.loaded.seconds
    if blocks := moe_blocks(model):
        answer.experts = (blocks[0].num_experts, blocks[0].experts.num_local)
    return model, meshes


def _step(request: Request, model: Any, meshes: Meshes, answer: RankAnswer, *, first: bool) -> None:
    layout, device = request.layout, next(model.parameters()).device
    runtime = devices.torch_module(device.type)
    rows, mine = own_rows(request.batch, dist.get_rank() // layout.tensor, layout.data)
    mine = {name: value.to(device) for name, value in mine.items()}
    model.zero_grad()
    begun = time.perf_counter()
    # Gradients are averaged over the data ranks. Training never gathers logits; the comparison needs them once.
    output = model(**mine, num_items_in_batch=request.tokens / layout.data, gather_logits=first)
    runtime.synchronize()
    turned = time.perf_counter()
    output.loss.backward()
    runtime.synchronize()
    answer.forward.append(turned - begun)
    answer.backward.append(time.perf_counter() - turned)
    if first:
        loss = output.loss.detach() / layout.data
        if layout.data > 1:
            dist.all_reduce(loss, group=meshes.data_group)
        answer.loss, answer.rows = loss.item(), rows
        answer.grad_norm = float(total_grad_norm(list(model.parameters())))
        if dist.get_rank() % layout.tensor == 0:
            answer.logits = output.logits.detach().cpu()


@dataclass(kw_only=True)
class AloneAnswer:
    """One process's numbers; grad_norm is None without a backward pass."""

    loss: float
    logits: Tensor
    grad_norm: float | None
    forward: float
    backward: float
    peak: int

    def as_json(self) -> dict[str, Any]:
        """One process's numbers and costs, for `--json`."""
        return {
            "loss": self.loss,
            "gradient_norm": self.grad_norm,
            "forward_seconds": self.forward,
            "backward_seconds": self.backward,
            "peak_bytes": self.peak,
        }


def run_alone(rank: int, world_size: int, request: Request, threads: int, backward: bool) -> AloneAnswer:
    """Transformers' own model of the folder, on the CPU, in float32, or float64 if the ranks do."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    wide = request.dtype == "float64"
    with HostPeak() as peak:
        model = AutoModelForCausalLM.from_pretrained(
            request.folder,
            config=request.config,
            dtype=torch.float64 if wide else torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
        ).train()
        begun, norm = time.perf_counter(), None
        # Only from here: the files are read in their own types, and the frequencies of rotation are float32 in a run.
        with torch.set_grad_enabled(backward), float64_reference() if wide else nullcontext():
            output = model(**request.batch, use_cache=False)
            turned = time.perf_counter()
            if backward:
                output.loss.backward()
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
        ended = time.perf_counter()
    return AloneAnswer(
        loss=output.loss.item(),
        logits=output.logits.detach(),
        grad_norm=norm,
        forward=turned - begun,
        backward=ended - turned if backward else 0.0,
        peak=peak.grown,
    )


def compare(answers: Sequence[RankAnswer], alone: AloneAnswer) -> dict[str, float]:
    """Worst relative difference of any rank's loss, logits and gradient norm to one process's."""
    worst: dict[str, float] = {}
    pairs = {"loss": alone.loss, "gradient norm": alone.grad_norm}
    for answer in answers:
        for name, wanted in pairs.items():
            if wanted is not None:
                found = answer.loss if name == "loss" else answer.grad_norm
                difference = abs(found - wanted) / max(abs(wanted), 1e-300)
                worst[name] = max(worst.get(name, 0.0), difference if isfinite(difference) else float("inf"))
        if answer.logits is not None:
            first, last = answer.rows
            difference = relative_difference(answer.logits, alone.logits[first:last])
            worst["logits"] = max(worst.get("logits", 0.0), difference)
    return worst
