"""Hold an exported folder against its source, bit for bit: file by file, and through transformers' own loader.

The second does not know our name table. Both read the source in runs of rows, so that memory does not grow with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from torch import Tensor

from lightning_npu_tp.weights.hf_folder import Outline
from lightning_npu_tp.weights.row_runs import file_rows, model_rows
from lightning_npu_tp.weights.sources import TensorSource

# transformers' loader maps the files, fills the model and stacks the experts of one layer at a time.
_RELOAD_FACTOR = 1.3


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second))
    return torch.equal(one, other)


def compare_files(
    source: TensorSource, plan: Outline, folder: Path, files: Iterable[str], dtypes: dict[str, torch.dtype]
) -> tuple[int, list[str]]:
    """Every tensor of the safetensors files against the source, row by row, through the safetensors package.

    dtypes: of the files, by transformers' name.
    Returns how many are equal, and a text for each that is not, that is missing or that is too many.
    """
    wanted = {piece.key for pieces in plan.pieces.values() for piece in pieces}
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(folder / name, "pt")) for name in files]
        place = {key: file for file in opened for key in file.keys()}  # noqa: SIM118
        unequal = place.keys() ^ wanted
        for key, first_row, rows in file_rows(source, plan, dtypes):
            if key not in place:
                continue
            file = place[key]
            part = file.get_slice(key)[first_row : first_row + len(rows)] if rows.ndim else file.get_tensor(key)
            if not _same_bits(part, rows):
                unequal.add(key)
    return len(wanted - unequal), [f"{key} in the files" for key in sorted(unequal)]


def too_large_to_reload(weight_bytes: int) -> str:
    """Why `compare_reloaded` has no room for a model of so many bytes, or an empty text."""
    needed, free = int(weight_bytes * _RELOAD_FACTOR), psutil.virtual_memory().available
    if needed <= free:
        return ""
    return (
        f"Not loaded through transformers, which would take {needed:,} bytes of memory ({free:,} are free); the files "
        f"themselves were compared."
    )


def compare_reloaded(
    source: TensorSource, plan: Outline, folder: Path, dtypes: dict[str, torch.dtype]
) -> tuple[int | None, list[str]]:
    """Load the folder as a user would, strictly, and compare what transformers made of it by the model's own names.

    Returns how many tensors are equal, None where it does not load, and a text for each difference.
    """
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, dtype="auto", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a user would meet
        return None, [f"transformers cannot load the folder: {error}"]
    model, report = loaded
    differences = [
        f"{name}: transformers reports {kind}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        for name in sorted(map(str, report.get(kind) or []))
    ]
    state = model.state_dict()
    equal = 0
    for name, shape in plan.shapes.items():
        same = name in state and tuple(state[name].shape) == shape
        for bounds, rows in model_rows(source, plan, name, dtypes[name]):
            # Read on where it is known to differ: a live source's ranks count on it.
            same = same and _same_bits(state[name][tuple(slice(*pair) for pair in bounds)], rows)
        equal += same
        differences += [] if same else [f"{name} as transformers loads it"]
    return equal, differences
