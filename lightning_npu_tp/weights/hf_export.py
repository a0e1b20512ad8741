"""Weights out: a Hugging Face folder in the published per-expert names, from a training checkpoint or a live run.

Tensors are read in runs of rows (row_runs.py) and written file by file (safetensors_shards.py), so that memory does not
grow with the model but holds one file. The folder is written under a temporary name, held against its source bit for
bit (hf_compare.py), and renamed. No device and no process group is needed for a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lightning_npu_tp.checkpoint.files import PARTIAL, beside, delete, fsync_file, fsync_folder, in_place, left_beside
from lightning_npu_tp.checkpoint.locks import hold, reading
from lightning_npu_tp.checkpoint.manifest import Manifest
from lightning_npu_tp.checkpoint.peers import Peers
from lightning_npu_tp.checkpoint.reader import open_checkpoint, read_rest
from lightning_npu_tp.checkpoint.tokenizer_files import GENERATION_FILE, HERE, TOKENIZER_FILES
from lightning_npu_tp.errors import CheckpointError, ConfigError
from lightning_npu_tp.models.families.family import ModelFamily
from lightning_npu_tp.weights.hf_compare import compare_files, compare_reloaded, too_large_to_reload
from lightning_npu_tp.weights.hf_config import told_of_readers
from lightning_npu_tp.weights.hf_folder import Outline, outline, tokenizer_files, write_side_files
from lightning_npu_tp.weights.row_runs import file_rows
from lightning_npu_tp.weights.safetensors_shards import Shards
from lightning_npu_tp.weights.sources import FileSource, FolderSource, TensorSource
from lightning_npu_tp.weights.tokenizer_check import compare_tokenizers, loading_problem

MAX_SHARD_BYTES = 5 * 10**9
# Headers, index, config, generation config: what the folder needs besides weights and tokenizer, generously.
_SIDE_BYTES = 16 * 2**20
_MAX_LABELS = 100_000
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}


@dataclass
class Exported:
    """What an export did.

    tensors:      number in the files; weight_bytes: theirs together.
    notes:        sentences that a user should read: what was left out, and why.
    compared:     how many tensors of the files are equal to the source's, None if it was not looked at.
    reloaded:     how many of transformers' tensors are, after loading the folder strictly.
    differences:  what is not equal, by name; then nothing is left at `folder`.
    """

    folder: Path
    files: list[str]
    tensors: int
    weight_bytes: int
    dtype: str
    notes: list[str] = field(default_factory=list)
    compared: int | None = None
    reloaded: int | None = None
    differences: list[str] = field(default_factory=list)


def export_checkpoint(
    path: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: Path | None = None,
    with_tokenizer: bool = True,
    config: Any = None,
    model: str | None = None,
    families: Sequence[ModelFamily] = (),
    verify: bool = True,
) -> Exported:
    """Export a training checkpoint: a folder of any layout, or a file of plain Lightning.

    dtype:     of the parameters; None keeps theirs. Buffers stay at least float32.
    tokenizer: folder or tokenizer.json; None takes the one that the checkpoint carries.
    config:    transformers config; None takes the manifest's, or the hyper-parameters'.
    model:     path of the model inside the LightningModule, where it holds several.
    verify:    checksums of the checkpoint before, comparisons after.

    Raises CheckpointError and ConfigError; then nothing is left at `out`.
    """
    require_free(out)
    with reading(in_place(path)) as pinned:
        where, manifest = open_checkpoint(pinned, Peers(), checksums=verify)
        source: FileSource | FolderSource = FileSource(where) if where.is_file() else FolderSource(where)
        prefix = None if model is None else f"{model}." if model else ""
        notes: list[str] = []
        if manifest is not None and manifest.models:
            name, about = _choose(manifest.models, model)
            prefix = f"{name}." if name else ""
            config = _config_from(about["config"], source.shapes) if config is None else config
        if config is None:
            rest = source.rest if isinstance(source, FileSource) else read_rest(where, True)
            config = _config_of_hyperparameters(rest, path, source.shapes)
        if with_tokenizer and tokenizer is None:
            tokenizer = _known_tokenizer(where, manifest, notes)
        plan = outline(config, source.shapes, prefix=prefix, families=families)
        done = export_source(
            source,
            plan,
            out,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            tokenizer=tokenizer,
            verify=verify,
            notes=notes,
        )
        done.notes, done.differences = (
            [text.replace(str(pinned), str(path)) for text in texts] for texts in (done.notes, done.differences)
        )
    return done


def export_source(
    source: TensorSource,
    plan: Outline,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: Path | None = None,
    verify: bool = True,
    notes: Sequence[str] = (),
) -> Exported:
    """Write the folder of `plan` from any source, and compare; see `export_checkpoint`."""
    dtypes = {name: _dtype_of(plan, source, name, dtype) for name in plan.shapes}
    tensors = {
        piece.key: torch.empty(piece.shape, dtype=dtypes[name], device="meta")
        for name in plan.shapes
        for piece in plan.pieces[name]
    }
    shards = Shards(tensors, max_shard_bytes)
    side = sum(file.stat().st_size for file in tokenizer_files(tokenizer)) if tokenizer is not None else 0
    main = next(dtypes[name] for name in plan.shapes if name not in plan.buffers)
    done = Exported(
        folder=out,
        files=list(shards.files),
        tensors=len(tensors),
        weight_bytes=shards.weight_bytes,
        dtype=str(main).removeprefix("torch."),
        notes=[*notes, *_left_out(source, plan), *told_of_readers(plan.config)],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with hold(out, "saving"):
        for left, name, kind in left_beside(out.parent):
            if (name, kind) == (out.name, PARTIAL):
                delete(left)
        needed = shards.weight_bytes + side + _SIDE_BYTES
        _require_space(out.parent, needed)
        partial = beside(out, PARTIAL)
        partial.mkdir()
        try:
            shards.write(partial, file_rows(source, plan, dtypes))
            write_side_files(partial, plan, main, tokenizer)
            if verify:
                done.compared, done.differences = compare_files(source, plan, partial, done.files, dtypes)
                if note := too_large_to_reload(done.weight_bytes):
                    done.notes.append(note)
                else:
                    done.reloaded, more = compare_reloaded(source, plan, partial, dtypes)
                    done.differences += more
                if tokenizer is not None:
                    told, fits = compare_tokenizers(tokenizer, partial)
                    (done.notes if fits else done.differences).append(told)
            if not done.differences:
                for file in partial.iterdir():
                    fsync_file(file)
                fsync_folder(partial)
                require_free(out)
                os.rename(partial, out)
                fsync_folder(out.parent)
        except (OSError, SafetensorError) as error:
            # safetensors has an error of its own for a disk that is full.
            why = getattr(error, "strerror", None) or error
            raise CheckpointError(
                f"{out} cannot be written: {why}. It needs {needed:,} bytes, "
                f"{shutil.disk_usage(out.parent).free:,} are free. Nothing was left there."
            ) from error
        finally:
            delete(partial)
    return done


def require_free(out: Path) -> None:
    """Raise ConfigError for a target that exists and is not an empty folder."""
    if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists already, and an export overwrites nothing. Choose another folder.")


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"The export needs {needed:,} bytes in {folder}, and {free:,} are free there. Free some space, or choose "
            f"another folder."
        )


def _dtype_of(plan: Outline, source: TensorSource, name: str, asked: torch.dtype | None) -> torch.dtype:
    stored = source.dtypes[plan.prefix + name]
    if asked is None or not stored.is_floating_point:
        return stored
    # A router's bias moves in steps that half precision would round away; transformers keeps it in float32, too.
    return torch.promote_types(asked, torch.float32) if name in plan.buffers else asked


def _left_out(source: TensorSource, plan: Outline) -> list[str]:
    """What the source has and the folder will not: our selection bias is told unless it is all zero."""
    notes, others = [], []
    for name in plan.left_out(list(source.shapes)):
        if not name.endswith("e_score_correction_bias"):
            others.append(name)
        elif bool(source.read(name, tuple((0, size) for size in source.shapes[name])).any()):
            notes.append(
                f"{name} is not zero and is left out: {plan.class_name} has no selection bias, so its router chooses "
                f"experts differently from the trained model's."
            )
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        notes.append(f"Left out, since they are not part of {plan.class_name}: {shown}.")
    return notes


def _choose(models: dict[str, dict[str, Any]], asked: str | None) -> tuple[str, dict[str, Any]]:
    if asked is None and len(models) == 1:
        return next(iter(models.items()))
    if asked not in models:
        names = ", ".join(repr(name) for name in models)
        raise ConfigError(f"The checkpoint holds {len(models)} models, {names}. Name one with --model.")
    return asked, models[asked]


def _config_from(values: dict[str, Any], stored: Collection[str]) -> Any:
    """A transformers config of what a checkpoint says.

    stored: names of its tensors, of which each layer has one: a config of more layers would take for ever to build.
    """
    from transformers import CONFIG_MAPPING

    name = str(values.get("model_type"))[:100]
    if name not in CONFIG_MAPPING:
        raise ConfigError(f"The model type {name!r} is not known to the installed transformers.")
    for key, most in (("num_hidden_layers", len(stored)), ("num_labels", _MAX_LABELS)):
        if key in values and not (type(values[key]) is int and 0 <= values[key] <= most):
            raise CheckpointError(
                f"The checkpoint's config says a {key} that its {len(stored)} tensors cannot have. Give the config "
                f"that it was trained with, with --config."
            )
    try:
        return CONFIG_MAPPING[name].from_dict(values)
    except Exception as error:
        # transformers' own checks of a config's fields are of many kinds.
        raise CheckpointError(
            f"The checkpoint's config is none of {name}: {type(error).__name__}: {str(error)[:500]}. Give the config "
            f"that it was trained with, with --config."
        ) from error


def _config_of_hyperparameters(rest: dict[str, Any], path: Path, stored: Collection[str]) -> Any:
    """LitCausalLM's hyper-parameters: architecture and config."""
    from transformers import CONFIG_MAPPING

    values = rest.get("hyper_parameters") or {}
    architecture, config = str(values.get("architecture")), values.get("config")
    if architecture not in CONFIG_MAPPING or not isinstance(config, dict):
        raise ConfigError(
            f"{path} does not say what its model's config is: it has no manifest, and no hyper-parameters architecture "
            f"and config. Give it with --config FOLDER_OR_FILE."
        )
    return _config_from(json.loads(json.dumps(config)) | {"model_type": architecture}, stored)


def _known_tokenizer(where: Path, manifest: Manifest | None, notes: list[str]) -> Path | None:
    """The folder of the tokenizer that a checkpoint carries; None, with a note, where it has none.

    Raises ConfigError for one that lies outside of it, which only its reader may point to, and for files that are no
    tokenizer.
    """
    known = None if manifest is None else manifest.tokenizer
    if manifest is None or known is None:
        notes.append(
            "No tokenizer files: the checkpoint does not say which tokenizer it was trained with (--tokenizer)."
        )
        return None
    source = known.get("source") or known["path"]
    if known["path"] is None and source is None:
        notes.append(f"No tokenizer files: the model was trained with the tokenizer {known['name']}, which has none.")
        return None
    if known["path"] != HERE:
        raise ConfigError(
            f"The checkpoint {where} was trained with the tokenizer {source} and does not carry its files; what lies "
            f"outside of a checkpoint is not read for it. If that is a tokenizer that you trust, give it with "
            f"--tokenizer, or --tokenizer none to export without one."
        )
    for file in (where / name for name in (*TOKENIZER_FILES, GENERATION_FILE)):
        if os.path.lexists(file) and file.name not in manifest.files:
            raise CheckpointError(f"{file} is not in the checkpoint's manifest: somebody has put it there. Remove it.")
    if problem := loading_problem(where):
        raise ConfigError(
            f"The tokenizer in the checkpoint {where} does not load: {problem}. Give one with --tokenizer, or "
            f"--tokenizer none to export without one."
        )
    return where
