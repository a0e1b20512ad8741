"""Time one mixture-of-experts block, forward and backward, against transformers' block and a plain matmul.

The three run in turns within one process, so that a noisy machine disturbs them alike; medians count.
`speedup_over_transformers` is transformers' time (grouped_mm experts, same weights and tokens) over ours.
`fraction_of_matmul` is our rate of useful floating-point operations over that of a 2048 x 2048 x 2048
matmul in the same dtype. Useful are three times the forward matmuls of routed experts, shared experts and
router. Gradients are cleared outside of the time taken.

    python benchmarks/moe_block.py --dtype bfloat16 --json moe.json
    python benchmarks/moe_block.py --device cuda --tokens 8192
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MLP, DeepseekV2Moe

from lightning_npu_tp.kernels import select
from lightning_npu_tp.models.moe.block import MoEBlock

MATMUL_SIZE = 2048
MATMULS_PER_ROUND = 3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=704, help="of one expert")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=6)
    parser.add_argument("--shared", type=int, default=2, help="shared experts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return parser.parse_args()


def make_blocks(args: argparse.Namespace, dtype: torch.dtype) -> tuple[MoEBlock, DeepseekV2Moe]:
    """Ours and transformers', with equal weights."""
    config = DeepseekV2Config(
        hidden_size=args.hidden,
        # Not used by the block, but the config insists that they fit the hidden size.
        num_attention_heads=1,
        num_key_value_heads=1,
        moe_intermediate_size=args.width,
        n_routed_experts=args.experts,
        num_experts_per_tok=args.top_k,
        n_shared_experts=args.shared,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device(args.device):
        theirs = DeepseekV2Moe(config)
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        ours = MoEBlock(
            hidden_size=args.hidden,
            expert_width=args.width,
            num_experts=args.experts,
            top_k=args.top_k,
            kernels=select(args.device),
            shared_experts=DeepseekV2MLP(config, intermediate_size=args.width * args.shared),
        )
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def useful_flops(args: argparse.Namespace) -> int:
    routed = args.tokens * args.top_k * 3 * args.width
    shared = args.tokens * 3 * args.width * args.shared
    router = args.tokens * args.experts
    return 3 * 2 * args.hidden * (routed + shared + router)


def seconds(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures; times in milliseconds, rates in GFLOP/s."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    ours, theirs = make_blocks(args, dtype)
    x = torch.randn(1, args.tokens, args.hidden, device=args.device).to(dtype).requires_grad_()
    grad = torch.randn_like(x)
    left, right = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, device=args.device).to(dtype)
    with torch.no_grad():
        exact = theirs(x).double()
        difference = ((ours(x).double() - exact).norm() / exact.norm()).item()

    times: dict[str, list[float]] = {"ours": [], "transformers": [], "matmul": []}
    for round_number in range(args.repeats + 1):
        for name, block in (("ours", ours), ("transformers", theirs)):
            for parameter in (x, *block.parameters()):
                parameter.grad = None
            elapsed = seconds(lambda block=block: block(x).backward(grad), args.device)
            if round_number:  # the first round warms up
                times[name].append(elapsed)
        for _ in range(MATMULS_PER_ROUND):
            elapsed = seconds(lambda: left @ right, args.device)
            if round_number:
                times["matmul"].append(elapsed)

    rate = useful_flops(args) / median(times["ours"])
    matmul_rate = 2 * MATMUL_SIZE**3 / median(times["matmul"])
    return {
        "speedup_over_transformers": median(times["transformers"]) / median(times["ours"]),
        "fraction_of_matmul": rate / matmul_rate,
        "ms": {name: median(values) * 1e3 for name, values in times.items()},
        "fastest_ms": {name: min(values) * 1e3 for name, values in times.items()},
        "gflops": {"ours": rate / 1e9, "matmul": matmul_rate / 1e9},
        "relative_difference_of_outputs": difference,
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
        "kernels": dict(select(args.device).names),
        "date": date.today().isoformat(),
        "machine": machine(args.device),
        "command": " ".join(["python", *sys.argv]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def main() -> None:
    args = arguments()
    figures = measure(args)
    print(f"{figures['machine']}, {args.threads} threads, torch {torch.__version__}, {args.dtype}")
    print(f"{'forward and backward':24}{'median ms':>12}{'fastest ms':>12}{'GFLOP/s':>10}")
    for name in ("ours", "transformers", "matmul"):
        work = 2 * MATMUL_SIZE**3 if name == "matmul" else useful_flops(args)
        fastest, middle = figures["fastest_ms"][name], figures["ms"][name]
        print(f"{name:24}{middle:12.1f}{fastest:12.1f}{work / middle / 1e6:10.0f}")
    print(f"speedup over transformers  {figures['speedup_over_transformers']:.2f}")
    print(f"fraction of the matmul     {figures['fraction_of_matmul']:.2f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
