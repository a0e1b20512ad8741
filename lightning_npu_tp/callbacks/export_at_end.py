"""`ExportAtEnd`: the trained model as a Hugging Face folder when a fit has ended, from the live, sharded weights.

The same folder, by the same code, as `lightning-npu-tp export` makes of a checkpoint. Whatever goes wrong with it is
told when the fit is over and its last checkpoint is safe: an export never costs a training run. A fit that an exception
ends exports nothing.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_npu_tp.errors import CheckpointError, ConfigError
from lightning_npu_tp.models.families.registry import FAMILIES, find_models
from lightning_npu_tp.weights.hf_export import DTYPES, Exported, export_source, require_free
from lightning_npu_tp.weights.hf_folder import outline, tokenizer_files
from lightning_npu_tp.weights.live_source import LiveSource

log = logging.getLogger(__name__)


class ExportAtEnd(Callback):
    """Exports the model inside the LightningModule to `folder`, once, when the fit ends.

    folder:          must not exist, or be empty.
    dtype:           of the parameters: bfloat16, float16, float32 or float64; None keeps theirs.
    max_shard_bytes: largest safetensors file.
    tokenizer:       folder or tokenizer.json; None takes the data module's, if it names one.
    model:           path of the model inside the module, where it holds several.
    families:        ModelFamily records of your own.
    verify:          compare the folder with the live weights, bit for bit.

    result: what was exported, on rank 0 after the fit.

    Raises ConfigError before training for a folder that is not free, an unknown dtype, a missing tokenizer and a module
    without a supported model; CheckpointError after it if the export failed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        dtype: str | None = None,
        max_shard_bytes: int = 5 * 10**9,
        tokenizer: str | os.PathLike[str] | None = None,
        model: str | None = None,
        families: Any = (),
        verify: bool = True,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"ExportAtEnd(dtype={dtype!r}) is not known. Set dtype to one of {list(DTYPES)} or null.")
        self.folder = Path(folder)
        self.dtype = None if dtype is None else DTYPES[dtype]
        self.max_shard_bytes = max_shard_bytes
        self.tokenizer = None if tokenizer is None else Path(tokenizer)
        self.model = model
        self.families = tuple(families)
        self.verify = verify
        self.result: Exported | None = None
        self._done = False
        self._error: Exception | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse now what could only fail later; rank 0 looks, and every rank raises."""
        self._done, self._error, self.result = False, None, None
        refusal = None
        if trainer.is_global_zero:
            try:
                require_free(self.folder)
                if (tokenizer := self._tokenizer(trainer)) is not None:
                    tokenizer_files(tokenizer)
            except ConfigError as error:
                refusal = str(error)
        if (refusal := trainer.strategy.broadcast(refusal)) is not None:
            raise ConfigError(refusal)
        self._find(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export while shards and process group are there."""
        self._export(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was done, or what failed; a fit of no steps exports here."""
        if not self._done:
            with trainer.strategy.process_group():  # type: ignore[attr-defined]
                self._export(trainer, pl_module)
        if self._error is not None:
            raise CheckpointError(
                f"The training is done, but its export failed: {self._error} Export a checkpoint instead: "
                f"`lightning-npu-tp export CKPT OUT`."
            ) from self._error

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done = True
        name, config = self._find(pl_module)
        try:
            source = LiveSource(pl_module, trainer.strategy.root_device)
            prefix = f"{name}." if name else ""

            def work() -> Exported:
                plan = outline(config, source.shapes, prefix=prefix, families=self.families)
                return export_source(
                    source,
                    plan,
                    self.folder,
                    dtype=self.dtype,
                    max_shard_bytes=self.max_shard_bytes,
                    tokenizer=self._tokenizer(trainer),
                    verify=self.verify,
                )

            self.result = source.run(work)
        except Exception as error:
            # Lightning's last checkpoint is written after this hook: it must come to that.
            self._error = error
            return
        if self.result is not None and self.result.differences:
            self._error = CheckpointError(f"these differ from the weights: {', '.join(self.result.differences[:5])}.")
        elif self.result is not None:
            notes = "".join(f" {note}" for note in self.result.notes)
            rank_zero_info(
                f"Exported {self.result.tensors} tensors to {self.folder}, {self.result.compared or 'none'} compared "
                f"bit for bit, {self.result.reloaded or 'none'} after loading through transformers.{notes}"
            )

    def _find(self, pl_module: LightningModule) -> tuple[str, Any]:
        found = {name: model for name, model, _ in find_models(pl_module, (*self.families, *FAMILIES))}
        if self.model is None and len(found) == 1:
            name = next(iter(found))
        elif self.model in found:
            name = str(self.model)
        else:
            raise ConfigError(
                f"ExportAtEnd(model={self.model!r}) cannot choose among the models of {type(pl_module).__name__}: "
                f"{', '.join(map(repr, found)) or 'none is supported'}. Set model to one of them, or leave it out."
            )
        return name, found[name].config

    def _tokenizer(self, trainer: Trainer) -> Path | None:
        if self.tokenizer is not None:
            return self.tokenizer
        path = getattr(getattr(getattr(trainer, "datamodule", None), "tokenizer", None), "path", None)
        return None if path is None else Path(path)
