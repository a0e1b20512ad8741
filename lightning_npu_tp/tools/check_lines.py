"""What `lightning-npu-tp check` prints of each step: text from what was found, and nothing else."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from lightning_npu_tp.checkpoint.files import size_in_words
from lightning_npu_tp.tools.check_folder import Structure
from lightning_npu_tp.tools.check_ranks import AloneAnswer, RankAnswer, Request
from lightning_npu_tp.weights.safetensors_reader import WeightFiles

_INDENT = "      "
_SHOWN = 8
_WIDTH = 100


def say(title: str, *lines: str) -> None:
    """Print a step's title, if it has one, and its lines, indented and wrapped."""
    if title:
        print(title)
    for line in lines:
        indent = _INDENT + " " * (len(line) - len(line.lstrip()))
        print(
            textwrap.fill(
                line.strip(),
                _WIDTH,
                initial_indent=indent,
                subsequent_indent=f"{indent}  ",
                break_long_words=False,
                break_on_hyphens=False,
            ),
            flush=True,
        )


def files(found: WeightFiles) -> str:
    """How many files and tensors a folder has, of how many bytes and which types."""
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in found.tensors.values()})
    count = "1 file" if len(found.files) == 1 else f"{len(found.files)} files"
    return f"{count}, {len(found.tensors):,} tensors, {size_in_words(found.nbytes)} of {', '.join(kinds)}"


def loaded(answers: Sequence[RankAnswer]) -> list[str]:
    """How much the ranks read and how fast, and a line for each reason why tensors were not used."""
    read, seconds = sum(answer.read_bytes for answer in answers), max(answer.read_seconds for answer in answers)
    each = "" if len(answers) == 1 else f" by {len(answers)} ranks, each its own slices"
    whys = list(answers[0].ignored.values())
    return [
        f"read {size_in_words(read)}{each}, in {_time(seconds)}: {size_in_words(round(read / max(seconds, 1e-9)))}/s; "
        f"all {answers[0].tensors:,} in use",
        *(f"not used: {whys.count(why)} tensors, {why}" for why in sorted(set(whys))),
    ]


def structure(found: Structure) -> list[str]:
    """Layers, experts and parameters of the model."""
    sizes = found.sizes
    counts = f"{found.parameters:,} parameters ({_count(found.parameters)})"
    if not sizes.experts:
        return [
            f"none: {found.family}, {sizes.layers} layers, all of them dense",
            f"{counts}, all of them at work for every token",
        ]
    dense = sizes.layers - sizes.sparse_layers
    shared = f"shared experts of width {sizes.shared_width:,} together" if sizes.shared_width else "no shared experts"
    return [
        f"{found.family}, {sizes.layers} layers: {dense} dense, {sizes.sparse_layers} with experts",
        f"{sizes.experts} experts, top {sizes.picks}, of width {sizes.expert_width:,}; {shared}",
        f"{counts}, of them {found.active:,} ({_count(found.active)}) at work for a token",
    ]


def conversion(answers: Sequence[RankAnswer], total: int) -> list[str]:
    """What was replaced, and each rank's share of the `total` parameters; many ranks with the same share once."""
    swapped = ", ".join(f"{number} {name}" for name, number in sorted(answers[0].swapped.items()))
    shares = []
    for answer in answers:
        experts = f"{answer.experts[0]} experts -> {answer.experts[1]} local experts, " if answer.experts else ""
        share = f"{answer.parameters:,} parameters ({answer.parameters / total:.1%})"
        shares.append(f"{experts}{share}, {size_in_words(answer.local_bytes)}")
    shown = len(shares) if len(shares) <= 2 * _SHOWN or len(set(shares)) > 1 else _SHOWN
    lines = [f"replaced: {swapped}", *(f"rank {rank}: {share}" for rank, share in enumerate(shares[:shown]))]
    return lines if shown == len(shares) else [*lines, f"and {len(shares) - shown} more ranks with the same"]


def passes(
    answers: Sequence[RankAnswer], request: Request, output_shape: Sequence[int], *, with_experts: bool
) -> list[str]:
    """Layout, loss, times and memory of the passes on the device."""
    layout = request.layout
    ranks = f"{len(answers)} ranks" if len(answers) > 1 else "1 rank"
    experts = f", experts over {layout.expert}" if with_experts else ""
    steps = range(len(answers[0].forward))
    seconds = [max(answer.forward[step] + answer.backward[step] for answer in answers) for step in steps]
    forward = max(min(answer.forward[1:]) for answer in answers)
    backward = max(min(answer.backward[1:]) for answer in answers)
    return [
        f"on the device: {request.device_type}, {ranks} (data {layout.data}, tensor {layout.tensor}{experts}), "
        f"{request.dtype}",
        f"  logits {list(output_shape)}, loss {answers[0].loss:.6f}, gradient norm {answers[0].grad_norm:.6f}",
        f"  first step {_time(seconds[0])}, later {_time(min(seconds[1:]))} "
        f"(forward {_time(forward)}, backward {_time(backward)})",
        f"  peak memory of a rank {size_in_words(max(answer.peak for answer in answers))}, of it weights "
        f"{size_in_words(max(answer.local_bytes for answer in answers))}",
    ]


def comparison(
    alone: AloneAnswer, dtype: str, left_out: str, differences: Mapping[str, float], bound: float
) -> list[str]:
    """One process's numbers in `dtype`, and how far the ranks' are from them."""
    norm = "" if alone.grad_norm is None else f", gradient norm {alone.grad_norm:.6f}"
    backward = f"; {left_out}" if left_out else f", backward {_time(alone.backward)}"
    found = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    return [
        f"on the CPU: transformers' own model in one process, {dtype}",
        f"  logits {list(alone.logits.shape)}, loss {alone.loss:.6f}{norm}",
        f"  forward {_time(alone.forward)}{backward}; peak memory {size_in_words(alone.peak)}",
        f"relative difference: {found}; bound {bound:.0e}",
    ]


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"
