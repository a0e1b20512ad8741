"""A source's tensors in runs of rows, by the model's names and by those of the files; a run is what is in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_npu_tp.models.file_names import Bounds
from lightning_npu_tp.weights.hf_folder import Outline
from lightning_npu_tp.weights.sources import TensorSource

CHUNK_BYTES = 64 * 2**20


def model_rows(source: TensorSource, plan: Outline, name: str, dtype: torch.dtype) -> Iterator[tuple[Bounds, Tensor]]:
    """A tensor of the model in runs of rows of dim 0, in order: their bounds in it, and the rows in `dtype`.

    name: transformers' name. A run has at most CHUNK_BYTES, or one row (of an expert stack, one expert).
    """
    shape, full_name = plan.shapes[name], plan.prefix + name
    if not shape:
        yield (), source.read(full_name, ()).to(dtype)
        return
    row_bytes = source.dtypes[full_name].itemsize * torch.Size(shape[1:]).numel()
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    for first in range(0, shape[0], step):
        bounds = ((first, min(first + step, shape[0])), *((0, size) for size in shape[1:]))
        yield bounds, source.read(full_name, bounds).to(dtype)


def file_rows(source: TensorSource, plan: Outline, dtypes: dict[str, torch.dtype]) -> Iterator[tuple[str, int, Tensor]]:
    """Every tensor of the files, in their order: its name there, the first row of dim 0, and the rows.

    dtypes: by transformers' name. The rows are parts of one run of `model_rows`.
    """
    for name in plan.shapes:
        for bounds, rows in model_rows(source, plan, name, dtypes[name]):
            for piece in plan.pieces[name]:
                if (overlap := piece.overlap(bounds)) is None:
                    continue
                inside, target = overlap
                part = rows[tuple(slice(*pair) for pair in target)]
                yield piece.key, inside[0][0] if inside else 0, part.squeeze(0) if piece.stacked else part
