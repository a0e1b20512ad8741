"""Peak of torch_npu's allocator in a training step against the package's own arithmetic (`estimates/step_memory.py`).

    python -m ascend_sim run -n 2 -- benchmarks/memory_arithmetic.py --json benchmarks/results/memory_arithmetic.json

Three models in three layouts and `MORE`, with the fused kernels and an even router, in the order of a trainer's step:
forward pass with the last step's gradients still there, backward pass, AdamW. Runs on a card as well. The models are
large enough that an allocator's rounding (up to a megabyte a tensor) is not what is measured, and shallow, since a
simulated card computes on the host.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_npu_tp import kernels
from lightning_npu_tp.convert.convert import Options, convert
from lightning_npu_tp.convert.data_parallel import reduce_gradients
from lightning_npu_tp.devices.device import backend_for, torch_module
from lightning_npu_tp.estimates.layer_memory import Shape, fused_by
from lightning_npu_tp.estimates.model_sizes import ModelSizes
from lightning_npu_tp.estimates.step_memory import Model, StepPeak, step_peak
from lightning_npu_tp.models.families.registry import FAMILIES, find_models
from lightning_npu_tp.models.moe.router import TopKRouter
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes, resolve_dispatch
from lightning_npu_tp.parallel.plan import match_plan
from lightning_npu_tp.tools.testing.ranks import run_ranks

_DEEPSEEK: dict[str, Any] = {
    "vocab_size": 8192,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_shared_experts": 2,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "use_cache": False,
}
_QWEN: dict[str, Any] = {
    "vocab_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "use_cache": False,
    "tie_word_embeddings": False,
}
_WORDS = {"vocab_size": 49152, "hidden_size": 512, "num_hidden_layers": 2, "intermediate_size": 1024}
# name -> (architecture, config, sequences, tokens of each)
MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "mixture": (
        "deepseek_v2",
        _DEEPSEEK
        | {
            "hidden_size": 1024,
            "num_hidden_layers": 3,
            "intermediate_size": 2816,
            "num_attention_heads": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 704,
        },
        2,
        512,
    ),
    "long": (
        "deepseek_v2",
        _DEEPSEEK
        | {
            "hidden_size": 768,
            "num_hidden_layers": 4,
            "intermediate_size": 2048,
            "num_attention_heads": 8,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 256,
        },
        2,
        1024,
    ),
    "dense": ("qwen3", _QWEN | {"hidden_size": 1024, "num_hidden_layers": 4, "intermediate_size": 3072}, 2, 512),
    # Few tokens: what parameters and gradients need, in the layers, in many experts, and around the layers.
    "wide": ("qwen3", _QWEN | {"hidden_size": 1024, "num_hidden_layers": 4, "intermediate_size": 4096}, 1, 128),
    "sparse": (
        "deepseek_v2",
        _DEEPSEEK
        | {
            "hidden_size": 512,
            "num_hidden_layers": 4,
            "intermediate_size": 1024,
            "num_attention_heads": 8,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 4,
            "moe_intermediate_size": 1024,
        },
        1,
        128,
    ),
    "words": ("qwen3", _QWEN | _WORDS, 1, 256),
    "tied": ("qwen3", _QWEN | _WORDS | {"tie_word_embeddings": True}, 1, 256),
}
LAYOUTS = {
    "one card": Layout(1, 1, 1),
    "tensor 2": Layout(1, 2, 2),
    "data 2": Layout(2, 1, 2),
}
# What else decides: experts that data ranks share, slices, replicas, recompute, micro-batches; model, layout, options.
MORE: list[tuple[str, str, Layout, dict[str, Any]]] = [
    ("mixture", "shared", Layout(2, 1, 1), {}),
    ("mixture", "shared", Layout(2, 1, 1), {"recompute": "moe"}),
    ("mixture", "shared", Layout(2, 1, 1), {"recompute": "block"}),
    ("mixture", "shared", Layout(2, 1, 1), {"data_parallel": "replicate"}),
    ("mixture", "shared", Layout(2, 1, 1), {"micro_batches": 2}),
    ("mixture", "slices", Layout(1, 2, 2), {"sequence_parallel": True}),
    ("mixture", "slices", Layout(1, 2, 2), {"sequence_parallel": True, "recompute": "block"}),
    ("mixture", "one card", Layout(1, 1, 1), {"micro_batches": 2}),
    ("long", "both", Layout(2, 2, 2), {}),
    ("long", "both", Layout(2, 2, 4), {"sequence_parallel": True}),
    ("dense", "data 2", Layout(2, 1, 2), {"data_parallel": "replicate"}),
    ("dense", "data 2", Layout(2, 1, 2), {"recompute": "block"}),
    ("dense", "data 2", Layout(2, 1, 2), {"micro_batches": 2}),
    ("wide", "one card", Layout(1, 1, 1), {}),
    ("wide", "data 2", Layout(2, 1, 2), {}),
    ("wide", "data 2", Layout(2, 1, 2), {"recompute": "block"}),
    ("sparse", "shared", Layout(2, 1, 1), {}),
    ("sparse", "shared", Layout(2, 1, 1), {"recompute": "block"}),
    ("sparse", "shared", Layout(2, 1, 1), {"data_parallel": "replicate"}),
    ("sparse", "data 2", Layout(2, 1, 2), {}),
    ("sparse", "both", Layout(2, 2, 2), {"micro_batches": 3}),
    ("words", "one card", Layout(1, 1, 1), {}),
    ("words", "data 2", Layout(2, 1, 2), {}),
    ("tied", "data 2", Layout(2, 1, 2), {}),
]


def measure(
    rank: int,
    world_size: int,
    name: str,
    layout: Layout,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    device_type: str = "npu",
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of this rank's peaks in a step, measured and by arithmetic.

    options: of `Options`, and micro_batches, whose gradients a step sums.
    """
    architecture, values, batch, length = MODELS[name]
    module: Any = torch_module(device_type)
    module.set_device(rank)
    device = torch.device(device_type, rank)
    if not dist.is_initialized():
        backend = backend_for(device_type)
        if world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend, rank=rank, world_size=world_size)
    config = AutoConfig.for_model(architecture, **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    how, micro_batches = _options(options)
    chosen, meshes = kernels.select(device_type), Meshes.build(layout, device_type)
    convert(
        model, meshes=meshes, groups=Groups(meshes), kernels=chosen, device=device, dtype=dtype, seed=0, options=how
    )
    _choose_evenly(model)
    optimizer = torch.optim.AdamW(model.train().parameters())
    ids = torch.randint(0, values["vocab_size"], (batch, length), device=device)

    def peak() -> int:
        module.synchronize()
        most = module.max_memory_allocated()
        module.reset_peak_memory_stats()
        return int(most)

    measured: dict[str, int] = {}
    for _ in range(2):
        measured = {"forward": 0, "backward": 0}
        for number in range(micro_batches):
            reduce_gradients(model, number == micro_batches - 1)
            peak()
            output = model(input_ids=ids, labels=ids)
            loss = output.loss if output.aux_loss is None else output.loss + output.aux_loss
            del output
            module.synchronize()
            if number == 0:
                optimizer.zero_grad()
            measured["forward"] = max(measured["forward"], peak())
            loss.backward()
            del loss
            measured["backward"] = max(measured["backward"], peak())
        optimizer.step()
        measured["optimizer"] = peak()
    predicted = predict(name, layout, options, dtype, device_type)
    parts = {part: getattr(predicted, part) for part in measured}
    if world_size > 1:
        dist.barrier()
    return measured, parts


def predict(
    name: str, layout: Layout, options: dict[str, Any], dtype: torch.dtype, device_type: str = "npu"
) -> StepPeak:
    """The arithmetic for one of the models; needs no device."""
    architecture, values, batch, length = MODELS[name]
    config, (how, micro_batches) = AutoConfig.for_model(architecture, **values), _options(options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    _, _, family = next(find_models(model, FAMILIES))
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    shape = Shape(
        sizes=ModelSizes.of(config),
        layout=layout,
        batch=batch,
        length=length,
        unit=dtype.itemsize,
        sequence_parallel=how.sequence_parallel,
        all_to_all=resolve_dispatch(layout, how.dispatch) == "all_to_all",
        fused=fused_by(kernels.select(device_type).names),
    )
    held = Model(
        shapes=shapes,
        rules=match_plan(
            family.plan(config),
            [name for name, _ in model.named_parameters(remove_duplicate=False)],
            family=family.name,
        ),
        bytes_per_element=dtype.itemsize,
        data_parallel=how.data_parallel,
    )
    return step_peak(held, shape, recompute=how.recompute, accumulates=micro_batches > 1)


def _options(options: dict[str, Any]) -> tuple[Options, int]:
    """Of the conversion, and the number of micro-batches."""
    given = dict(options)
    number = given.pop("micro_batches", 1)
    return Options(**given), number


def _choose_evenly(model: Any) -> None:
    """Every expert gets as many tokens: how many rows travel to a rank is the router's, and no arithmetic's."""
    for router in (module for module in model.modules() if isinstance(module, TopKRouter)):
        num_experts, num_picks = router.weight.shape[0], router.top_k

        def choose(module: Any, args: Any, kwargs: Any, num_experts: int = num_experts, k: int = num_picks) -> Any:
            picks = torch.arange(len(args[0]) * k, device=args[0].device).view(-1, k) % num_experts
            return args, {**kwargs, "experts_TK": picks}

        router.register_forward_pre_hook(choose, with_kwargs=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=["mixture", "long", "dense"])
    parser.add_argument("--layouts", nargs="*", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--more", nargs="*", choices=list(MODELS), help="also what MORE has of these models, or all")
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    options = {"recompute": arguments.recompute, "sequence_parallel": arguments.sequence_parallel}
    cases = [(name, title, LAYOUTS[title], options) for name in arguments.models for title in arguments.layouts]
    if arguments.more is not None:
        cases += [case for case in MORE if not arguments.more or case[0] in arguments.more]
    figures = []
    print(
        f"{'model':8s} {'layout':9s} {'predicted MB':>13s} {'measured MB':>12s} {'ratio':>6s}  of each part of the step"
    )
    for name, title, layout, how in cases:
        dtype = getattr(torch, arguments.dtype)
        results = run_ranks(measure, layout.world, name, layout, how, dtype, timeout=580, backend=None)
        # The fullest rank; the arithmetic is of rank 0, which never holds less.
        measured = {part: max(result[0][part] for result in results) for part in results[0][0]}
        predicted = results[0][1]
        most, counted = max(measured.values()), max(predicted.values())
        parts = ", ".join(f"{part} {predicted[part] / measured[part]:.3f}" for part in measured)
        ratio = counted / most
        more = "" if how is options else f"  {how}"
        print(f"{name:8s} {title:9s} {counted / 1e6:13.1f} {most / 1e6:12.1f} {ratio:6.3f}  {parts}{more}", flush=True)
        figures.append(
            {
                "model": name,
                "layout": [layout.data, layout.tensor, layout.expert],
                "options": how,
                "predicted": predicted,
                "measured": measured,
                "ratio": ratio,
            }
        )
    if arguments.json:
        result = {
            "date": date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "machine": f"{platform.machine()}, simulated cards",
            "torch": torch.__version__,
            "dtype": arguments.dtype,
            "bytes": figures,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
