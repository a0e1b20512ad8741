"""The safetensors files of a Hugging Face folder, written one at a time from rows that come in order.

huggingface_hub splits, as transformers does; safetensors writes. The rows of a file are collected until it is whole,
so that one file is in memory and not the model. Which names and tensors, the caller says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_npu_tp.errors import CheckpointError
from lightning_npu_tp.weights.safetensors_reader import INDEX_FILE


class Shards:
    """Which tensor goes into which file, in order; a file holds at most `max_bytes`, or one tensor that is larger.

    tensors:      name in the files -> a tensor on meta of its shape and dtype.
    files:        name of each file -> names of its tensors.
    weight_bytes: of all tensors together.
    """

    def __init__(self, tensors: Mapping[str, Tensor], max_bytes: int) -> None:
        from huggingface_hub import split_torch_state_dict_into_shards

        split: Any = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_bytes)
        self.tensors = tensors
        self.files: dict[str, list[str]] = split.filename_to_tensors
        self.weight_bytes: int = split.metadata["total_size"]
        self._file_of: dict[str, str] = split.tensor_to_filename

    def write(self, folder: Path, rows: Iterable[tuple[str, int, Tensor]]) -> None:
        """Write all files, and the index if there are several.

        rows: (name in the files, first row of dim 0, rows on the CPU); each row once, in the order of the names. Of a
        scalar, the scalar itself.

        In memory is the file whose rows come, at most `max_bytes`, and beside it a tensor that is larger.
        Raises CheckpointError that names a tensor of which values are missing or come twice.
        """
        missing = {key: tensor.numel() for key, tensor in self.tensors.items()}
        filling: dict[str, dict[str, Tensor]] = {}
        for key, first, part in rows:
            if missing.get(key, 0) < part.numel():
                raise CheckpointError(f"{key} is not expected (again). Correct the keys of its ModelFamily.")
            file = self._file_of[key]
            if file not in filling:
                filling[file] = {k: torch.empty_like(self.tensors[k], device="cpu") for k in self.files[file]}
            target = filling[file][key]
            (target[first : first + len(part)] if target.ndim else target).copy_(part)
            missing[key] -= part.numel()
            if not any(missing[k] for k in self.files[file]):
                save_file(filling.pop(file), folder / file, {"format": "pt"})
        if lacking := sorted(key for key, count in missing.items() if count):
            raise CheckpointError(f"{len(lacking)} tensors were never written, {lacking[0]} first.")
        if len(self.files) > 1:
            parameters = sum(tensor.numel() for tensor in self.tensors.values())
            metadata = {"total_parameters": parameters, "total_size": self.weight_bytes}
            index = {"metadata": metadata, "weight_map": self._file_of}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
