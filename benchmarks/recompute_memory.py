"""Bytes that one decoder layer keeps and needs at its peak, by recompute setting, measured and by arithmetic.

    python benchmarks/recompute_memory.py --json benchmarks/results/recompute_memory.json

One mixture layer of V2-Lite's shape, scaled down, on two tensor ranks (gloo, bfloat16, the kernels of a
card composed of grouped matmuls). Every storage that is made during forward and backward is followed
until it is freed; parameters and their gradients are left out. `kept` is what lives between forward
and backward, `peak` the most at any moment. The arithmetic counts what must be kept, tensor by tensor.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import weakref
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from lightning_npu_tp import kernels
from lightning_npu_tp.convert.convert import Options, convert
from lightning_npu_tp.parallel.forward_pass import ForwardPass
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes
from lightning_npu_tp.tools.testing.ranks import run_ranks

SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 512,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "num_attention_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 16,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "moe_intermediate_size": 352,
    "intermediate_size": 2736,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
RANKS = 2


class FollowStorages(TorchDispatchMode):
    """Bytes of storages that were made inside and are still alive, and the most there ever were."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.live, self.peak, self._seen = 0, 0, set(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def measure(rank: int, world_size: int, batch: int, length: int, sliced: bool, recompute: Any) -> dict[str, int]:
    torch.manual_seed(0)
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**SHAPE)).to(torch.bfloat16).train()
    meshes = Meshes.build(Layout.resolve(world=world_size), "cpu")
    convert(
        model,
        meshes=meshes,
        groups=Groups(meshes),
        kernels=kernels.select("cuda"),
        device=torch.device("cpu"),
        dtype=None,
        seed=0,
        options=Options(sequence_parallel=sliced, recompute=recompute),
    )
    decoder = model.model
    steps = -(-length // world_size) if sliced else length
    hidden = torch.randn(batch, steps, SHAPE["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    tables = decoder.rotary_emb(hidden, torch.arange(length)[None])
    layer, inputs = decoder.layers[0], {"position_embeddings": tables, "attention_mask": None}
    for _ in range(2):
        # The first pass makes gradients and workspaces, which stay.
        known = {p.to_local().untyped_storage()._cdata for p in model.parameters()}
        known |= {p.grad.to_local().untyped_storage()._cdata for p in model.parameters() if p.grad is not None}
        known.add(hidden.untyped_storage()._cdata)
        with FollowStorages(known) as storages:
            step = ForwardPass(decoder.region.sliced(length if sliced else None))
            output = layer(hidden, step=step, **inputs)
            kept = storages.live
            output.backward(torch.ones_like(output))
        peak = storages.peak
        del output
    dist.barrier()
    return {"kept": kept, "peak": peak}


def arithmetic(batch: int, length: int, sliced: bool, recompute: str) -> int:
    """Bytes that the backward pass of one layer needs: bfloat16 is 2, what is computed in float32 is 4."""
    c, t = SHAPE, RANKS
    hidden, heads = c["hidden_size"], c["num_attention_heads"] // t
    whole = batch * length
    outside = whole // t if sliced else whole
    key, value, width = c["qk_nope_head_dim"] + c["qk_rope_head_dim"], c["v_head_dim"], c["moe_intermediate_size"]
    if recompute == "block":
        # The input, which the layer before keeps as its output; here it is the output of this one.
        return 2 * outside * hidden
    # Of each of the two norms: its input in float32 and its result before the weight.
    norms = 2 * outside * hidden * (4 + 2)
    entered = 2 * 2 * whole * hidden
    latent = whole * c["kv_lora_rank"] * (4 + 2 + 2)
    # q, k and v as attention takes them in, its result, and what the rotation keeps of q.
    attention = 2 * whole * heads * (2 * key + value + value)
    rows = whole * c["num_experts_per_tok"]
    # Rows of this rank: as many as the picks of an even router, in buffers as large as all of them.
    experts = 2 * rows * hidden + 2 * rows * hidden
    hidden_activations = 2 * rows * (2 * width + width + width)
    shared = 2 * whole * 4 * (c["n_shared_experts"] * width // t)
    router = whole * (hidden * 4 + 3 * c["n_routed_experts"] * 4) if not sliced else outside * hidden * 4
    result = 2 * outside * hidden * 2
    total = norms + entered + latent + attention + shared + router + result
    return total if recompute == "moe" else total + experts + hidden_activations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shape = (arguments.batch, arguments.length)
    figures = []
    print(f"{'sequences':10s} {'recompute':10s} {'kept MB':>9s} {'arithmetic':>11s} {'peak MB':>9s}")
    for sliced in (False, True):
        for recompute in ("none", "moe", "block"):
            measured = run_ranks(measure, RANKS, *shape, sliced, recompute, timeout=200)
            kept, peak = (max(rank[name] for rank in measured) for name in ("kept", "peak"))
            counted = arithmetic(*shape, sliced, recompute)
            name = "sliced" if sliced else "whole"
            print(f"{name:10s} {recompute:10s} {kept / 1e6:9.1f} {counted / 1e6:11.1f} {peak / 1e6:9.1f}", flush=True)
            figures.append(
                {"sequences": name, "recompute": recompute, "kept": kept, "arithmetic": counted, "peak": peak}
            )
    if arguments.json:
        result = {
            "date": date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "machine": f"{platform.machine()}, {RANKS} ranks on cpu",
            "torch": torch.__version__,
            "shape": SHAPE,
            "bytes": figures,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
