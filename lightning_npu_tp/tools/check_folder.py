"""What `lightning-npu-tp check` can say of a Hugging Face folder before a process is started.

Its config, its tokenizer, the structure of its model, and the memory that ranks and one process would need. What the
processes do is `check_ranks.py`'s, what is printed `check_lines.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.devices import device as devices
from lightning_npu_tp.errors import ConfigError, DeviceError
from lightning_npu_tp.estimates.model_sizes import ModelSizes
from lightning_npu_tp.estimates.what_fits import Run, activations, needed
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.tools.check_ranks import DTYPES
from lightning_npu_tp.tools.model_config import read_model_config
from lightning_npu_tp.tools.prove import Plan, plan_of
from lightning_npu_tp.tools.testing.models import random_batch
from lightning_npu_tp.weights.hf_folder import tokenizer_files
from lightning_npu_tp.weights.tokenizer_check import difference_from_file

_PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-true", "float64": "64-true"}
# Python with torch and transformers.
_PROCESS_BYTES = 600_000_000
_TEXT = (
    "The mill stood where two rivers met, and whoever brought grain there before sunrise had flour at noon. "
    "Eight stones turned, each for another kind, and the miller sent every sack to the two that suited it best. "
)


def folder_config(model: str) -> Any:
    """The transformers config of a Hugging Face folder; code that lies in it is never run.

    Raises ConfigError for what is no such folder, or holds quantised weights.
    """
    if not Path(model).is_dir():
        what = "is a file" if Path(model).exists() else "does not exist"
        raise ConfigError(
            f"--model {model} {what}. Give the Hugging Face folder that holds config.json and the safetensors files; "
            f"`lightning-npu-tp download` fetches one, `lightning-npu-tp prove` needs a config only."
        )
    config = read_model_config(model)
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        kind = quantised.get("quant_method", "of an unknown kind") if isinstance(quantised, dict) else "quantised"
        raise ConfigError(
            f"--model {model} holds quantised weights ({kind}), which cannot be trained. Take the unquantised model, "
            f"or convert it to bfloat16 first."
        )
    # The ranks are told their dtype; what the files were saved in must not decide about buffers.
    config.dtype = None
    return config


def device_type(asked: str, ranks: int) -> str:
    """The device type for "auto", "cpu", "cuda" or "npu"; torch_npu is imported for an NPU alone.

    Raises DeviceError and ConfigError for one that is not there or has fewer devices than ranks.
    """
    if asked == "auto":
        asked = devices.NPU if devices.idle_npus("cpu") else "cuda" if torch.cuda.is_available() else "cpu"
    devices.backend_for(asked)
    if asked == "cpu":
        return asked
    count = torch.cuda.device_count() if asked == "cuda" else devices.npu_device_count()
    if asked == devices.NPU and not count:
        raise DeviceError(f"--device {asked} cannot be used here: {devices.npu_problem()} Or use --device cpu.")
    if count < ranks:
        raise ConfigError(
            f"--device {asked} has {count} devices here, and --data times --tensor asks for {ranks} ranks. Use fewer "
            f"ranks, or --device cpu, which holds any number."
        )
    return asked


def check_dtype(dtype: str, device_type: str) -> None:
    """Raise ConfigError for a --dtype that does not exist or that the device does not compute in."""
    works = [name for name, precision in _PRECISIONS.items() if precision in devices.supported_precisions(device_type)]
    if dtype not in works:
        raise ConfigError(f"--dtype {dtype} cannot be computed on {device_type}. Use one of {', '.join(works)}.")


@dataclass(frozen=True)
class Tokenizer:
    """What step 1 found: a line to print, the ids of a text (None: none to be had), and whether it is a fault."""

    line: str
    ids: list[int] | None = None
    fault: bool = False


def read_tokenizer(folder: str, vocabulary: int) -> Tokenizer:
    """Load the folder's tokenizer and hold it against the model's vocabulary; never raises."""
    try:
        tokenizer_files(Path(folder))
    except ConfigError:
        return Tokenizer("none in this folder; going on with random token ids")
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        size = 1 + max(tokenizer.get_vocab().values())
        ids = tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
        otherwise = difference_from_file(tokenizer, Path(folder))
    except Exception as error:
        # A tokenizer is data of somebody else, and fails in whatever way it pleases.
        words = " ".join(str(error).split())[:300]
        return Tokenizer(f"cannot be loaded ({type(error).__name__}: {words}); random ids instead", None, True)
    if otherwise is not None:
        return Tokenizer(f"{otherwise}; random ids instead", None, True)
    line = f"{type(tokenizer).__name__}, {size:,} tokens; the model's vocabulary has {vocabulary:,}"
    if size > vocabulary:
        return Tokenizer(f"{line}: the model lacks ids from {vocabulary:,} on; random ids instead", None, True)
    spare = f", {vocabulary - size:,} of them unused" if size < vocabulary else ""
    return Tokenizer(line + spare, ids or None)


def batch_of(config: Any, tokenizer: Tokenizer, rows: int, length: int) -> dict[str, Tensor]:
    """input_ids and labels, int64 [rows, length]: a text that begins elsewhere in each row, or random ids."""
    if tokenizer.ids is None:
        return random_batch(config, rows, length, seed=0)
    ids = torch.tensor(tokenizer.ids)
    places = (torch.arange(rows)[:, None] * 7 + torch.arange(length)[None, :]) % len(ids)
    return {"input_ids": ids[places], "labels": ids[places]}


@dataclass(frozen=True)
class Structure:
    """What step 3 prints. parameters: in total; active: without the experts that a token does not pick."""

    family: str
    sizes: ModelSizes
    parameters: int
    active: int
    plan: Plan = field(repr=False)
    # A head that is the embedding has none of its own.
    shapes: dict[str, tuple[int, ...]] = field(repr=False)

    @classmethod
    def of(cls, config: Any) -> Structure:
        """The structure of a config's model; takes no memory. Raises ConversionError or ConfigError for another one."""
        plan, sizes = plan_of(config), ModelSizes.of(config)
        tied = {"lm_head.weight"} if getattr(config, "tie_word_embeddings", False) else set()
        shapes = {name: shape for name, shape in plan.shapes.items() if name not in tied}
        counts = {name: prod(shape) for name, shape in shapes.items()}
        idle = sum(
            number // sizes.experts * (sizes.experts - sizes.picks)
            for name, number in counts.items()
            if plan.rules[name].axis == "expert" and plan.rules[name].dim is not None
        )
        total = sum(counts.values())
        return cls(plan.family.name, sizes, total, total - idle, plan, shapes)

    def run(self, config: Any, layout: Layout, options: Options, dtype: str, rows: int, length: int) -> Run:
        """One step without an optimizer, as the arithmetic of memory takes it; rows: of all data ranks together."""
        width = DTYPES[dtype].itemsize
        return Run(
            sizes=self.sizes,
            shapes=self.shapes,
            rules=self.plan.rules,
            units=self.plan.family.units(config),
            layout=layout,
            batch=-(-rows // layout.data),
            length=length,
            bytes_per_element=width,
            activation_bytes=width,
            optimizer_states=0,
            sequence_parallel=options.sequence_parallel,
            recompute=options.recompute,
        )


def rank_bytes(run: Run) -> int:
    """About what one rank holds at the peak: weights, gradients, activations, gathered logits, Python."""
    logits = 3 * run.batch * run.length * run.sizes.vocabulary * max(4, run.activation_bytes)
    return needed(run) + logits + _PROCESS_BYTES


def alone_bytes(run: Run, *, backward: bool) -> int:
    """About what transformers needs for the same in one process in float32 (float64 for ranks in float64)."""
    width = max(4, run.activation_bytes)
    whole = replace(
        run,
        layout=Layout(1, 1, 1),
        batch=run.batch * run.layout.data,
        bytes_per_element=width,
        activation_bytes=width,
        sequence_parallel=False,
        recompute="none",
    )
    weights = width * sum(prod(shape) for shape in run.shapes.values())
    if backward:
        return rank_bytes(whole)
    # One stacked tensor of experts is joined from its parts beside what is there already.
    return weights + activations(whole) + width * max(prod(shape) for shape in run.shapes.values()) + _PROCESS_BYTES
