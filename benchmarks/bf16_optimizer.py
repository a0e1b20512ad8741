"""Fine-tuning of bfloat16 weights by recipe, beside float32; and the time of an update beside torch's fused AdamW.

    python benchmarks/bf16_optimizer.py --json bf16_optimizer.json

Recipes: a tiny DeepSeek-V2 with weights at std 0.02 is trained for some steps at a rate of fine-tuning on sentences of
a random grammar. Each recipe's figure is how far its weights moved (masters, where it has them), and how far the loss
on other sentences of the grammar fell, over what the same run in 32-true has; of the weights that a forward reads, and
of the masters, which their rounding does not disturb. All start from the same bfloat16 values.

Time: one update of the same parameters, in turns with torch.optim.AdamW(fused=True) over float32 ones; the median of
the ratios. Bytes are those that an update must read and write at least, a parameter.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_npu_tp.optim import AdamWBF16
from lightning_npu_tp.tools.testing.models import reference_model, tiny_deepseek_v2_config

RECIPES: dict[str, tuple[torch.dtype, Callable[..., Optimizer]]] = {
    "32-true, AdamW": (torch.float32, AdamW),
    "bf16-true, AdamW": (torch.bfloat16, AdamW),
    "bf16-true, AdamWBF16, float32 moments": (torch.bfloat16, AdamWBF16),
    "bf16-true, AdamWBF16, bfloat16 moments": (
        torch.bfloat16,
        lambda parameters, **settings: AdamWBF16(parameters, moments="bfloat16", **settings),
    ),
}
# Weight, gradient, remainder, two moments: read and, but for the gradient, written.
BYTES = {"AdamW over float32": 28, "float32 moments": 26, "bfloat16 moments": 18}
SHAPES = [(2048, 512)] * 8 + [(2048,)] * 10 + [(16, 256, 512)] * 2


def sentences(number: int, seed: int, vocabulary: int) -> Tensor:
    """int64 [number, 32]: each token follows from the one before it, but for one in eight."""
    follows = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (number, 32), generator=generator)
    stray = torch.rand(tokens.shape, generator=generator) < 1 / 8
    for place in range(1, tokens.shape[1]):
        tokens[:, place] = torch.where(stray[:, place], tokens[:, place], follows[tokens[:, place - 1]])
    return tokens


def train(model: nn.Module, make: Callable[..., Optimizer], rate: float, steps: int) -> tuple[float, float, float]:
    """How far the weights moved, and how far the validation loss of the weights and of the masters fell."""
    vocabulary = model.config.vocab_size
    start = [parameter.detach().float().clone() for parameter in model.parameters()]
    validation = sentences(64, 10_000, vocabulary)

    @torch.no_grad()
    def loss(values: list[Tensor]) -> float:
        wide = deepcopy(model).float()
        for parameter, value in zip(wide.parameters(), values, strict=True):
            parameter.copy_(value)
        return wide(input_ids=validation, labels=validation).loss.item()

    before = loss(start)
    optimizer = make(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        batch = sentences(8, step, vocabulary)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    is_ours = isinstance(optimizer, AdamWBF16)
    ends = [m for _, m in optimizer.masters()] if is_ours else [p.detach().float() for p in model.parameters()]
    moved = torch.cat([(end - old).flatten() for end, old in zip(ends, start, strict=True)]).norm().item()
    return moved, before - loss([p.detach() for p in model.parameters()]), before - loss(ends)


def trials(steps: int, rates: list[float]) -> list[dict[str, Any]]:
    # Weights at std 0.02, as a pretrained model's are; the head too, or the loss has nothing to fall from.
    config = tiny_deepseek_v2_config(num_hidden_layers=2, initializer_range=0.02)
    torch.manual_seed(0)
    model = reference_model(config).to(torch.bfloat16)
    rows = []
    for rate in rates:
        wide: tuple[float, float, float] | None = None
        for name, (dtype, make) in RECIPES.items():
            moved, fall, of_masters = train(deepcopy(model).to(dtype), make, rate, steps)
            wide = wide or (moved, fall, of_masters)
            rows.append({
                "rate": rate,
                "recipe": name,
                "moved": moved,
                "fall": fall,
                "moved_of_32_true": moved / wide[0],
                "fall_of_32_true": fall / wide[1],
                "masters_fall_of_32_true": of_masters / wide[2],
            })  # fmt: skip
            shares = [f"{one / whole:.4f}" for one, whole in zip((moved, fall, of_masters), wide, strict=True)]
            print(
                f"{rate:g}  {name:42} moved {shares[0]}, loss fell {shares[1]}, that of masters {shares[2]}", flush=True
            )
    return rows


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    found = [nn.Parameter((torch.randn(shape) * 0.02).to(dtype)) for shape in SHAPES]
    for parameter in found:
        parameter.grad = torch.randn(parameter.shape).to(dtype)
    return found


def times(repeats: int, bucket_mib: float) -> list[dict[str, Any]]:
    peer = AdamW(parameters(torch.float32), lr=1e-4, fused=True)
    rows = []
    for moments in ("float32", "bfloat16"):
        ours = AdamWBF16(parameters(torch.bfloat16), lr=1e-4, fused=True, moments=moments, bucket_mib=bucket_mib)
        ratios, seconds = [], []
        for turn in range(repeats + 1):
            taken = []
            for optimizer in (peer, ours):
                start = time.perf_counter()
                optimizer.step()
                taken.append(time.perf_counter() - start)
            # The first makes the states.
            if turn:
                ratios.append(taken[1] / taken[0])
                seconds.append(taken)
        rows.append({
            "moments": moments,
            "times_of_fused_adamw": median(ratios),
            "milliseconds": [1e3 * median(each) for each in zip(*seconds, strict=True)],
            "bytes": [BYTES["AdamW over float32"], BYTES[f"{moments} moments"]],
        })  # fmt: skip
        print(f"{moments} moments: {median(ratios):.2f} times fused AdamW over as many float32 parameters", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 1e-6])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--bucket-mib", type=float, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = {
        "date": date.today().isoformat(),
        "command": " ".join(sys.argv),
        "machine": f"{platform.processor() or platform.machine()}, {args.threads} threads",
        "torch": torch.__version__,
        "time": times(args.repeats, args.bucket_mib),
        "training": trials(args.steps, args.rates),
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
