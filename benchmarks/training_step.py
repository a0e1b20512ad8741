"""Time one full training step of the tiny DeepSeek-V2 beside transformers' own model, in one run.

    python benchmarks/training_step.py --json benchmarks/results/training_step.json

Forward, backward, clipping and AdamW on one process (tensor 1), with the same weights, batch and
optimizer. transformers runs with each of its experts implementations that works here, and the
fastest counts. The contestants take turns, so that a machine that slows down slows all of them;
medians are compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_npu_tp import kernels
from lightning_npu_tp.convert.convert import convert
from lightning_npu_tp.parallel.clipping import clip_grad_norm_
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes

ROOT = Path(__file__).parents[1]


class Contestant:
    def __init__(self, name, model, clip):
        self.name, self.model, self.clip = name, model.train(), clip
        # The fastest for both; the strategy chooses it by itself.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.seconds, self.loss = [], 0.0

    def step(self, batch):
        self.optimizer.zero_grad()
        loss = self.model(**batch).loss
        loss.backward()
        self.clip(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def timed_step(self, batch, synchronize):
        synchronize()
        start = time.perf_counter()
        loss = self.step(batch)
        synchronize()
        self.seconds.append(time.perf_counter() - start)
        self.loss = float(loss)


def tiny_config():
    node = yaml.safe_load((ROOT / "conf/model/deepseek_v2_tiny.yaml").read_text())
    return AutoConfig.for_model(node["architecture"], **node["config"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=16, help="sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each contestant")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    config = tiny_config()
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(config).to(device)
    ids = torch.randint(0, config.vocab_size, (arguments.batch, arguments.length), device=device)
    batch = {"input_ids": ids, "labels": ids}

    contestants = []
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        model = copy.deepcopy(original)
        model.set_experts_implementation(implementation)
        # A training loop of one's own would say so; it spares transformers a cache that nobody reads.
        model.config.use_cache = False
        contestants.append(Contestant(f"transformers {implementation}", model, torch.nn.utils.clip_grad_norm_))
    for contestant in contestants:
        contestant.step(batch)
        contestant.timed_step(batch, synchronize)
    fastest = min(contestants, key=lambda contestant: contestant.seconds[0])
    fastest.seconds.clear()

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups = Groups()
    meshes = Meshes.build(Layout.resolve(world=1), device.type)
    groups.bind(meshes)
    convert(
        original,
        meshes=meshes,
        groups=groups,
        kernels=kernels.select(device.type),
        device=device,
        dtype=None,
        seed=0,
    )
    ours = Contestant("lightning_npu_tp", original, clip_grad_norm_)
    ours.step(batch)
    ours.step(batch)
    for _ in range(arguments.repeats):
        for contestant in (fastest, ours):
            contestant.timed_step(batch, synchronize)
    dist.destroy_process_group()

    medians = {contestant.name: statistics.median(contestant.seconds) for contestant in (fastest, ours)}
    tokens = arguments.batch * arguments.length
    for name, seconds in medians.items():
        print(f"{name:28s} {seconds * 1e3:8.1f} ms/step {tokens / seconds:10.0f} tokens/s")
    speedup = medians[fastest.name] / medians[ours.name]
    print(f"speed-up {speedup:.2f} (losses {fastest.loss:.4f} and {ours.loss:.4f})")
    if arguments.json:
        result = {
            "date": date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "machine": f"{platform.machine()}, {arguments.threads} threads, {arguments.device}",
            "torch": torch.__version__,
            "median_seconds": medians,
            "all_seconds": {contestant.name: contestant.seconds for contestant in (fastest, ours)},
            "speedup_over_transformers": speedup,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
