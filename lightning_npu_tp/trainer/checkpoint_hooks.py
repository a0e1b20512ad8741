"""The strategy's part in checkpoints: what Lightning calls to save, load and remove them.

Collects what a checkpoint needs from trainer and module and hands it to the files of checkpoint/; there choose.py says
which checkpoint a run resumes from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_npu_tp.checkpoint import choose, identity, rank_state, reader, training_state, writer
from lightning_npu_tp.checkpoint.deferred import DeferredSaves, goes_on, step_is_half_made
from lightning_npu_tp.checkpoint.manifest import Manifest
from lightning_npu_tp.checkpoint.peers import PeerFailure, Peers
from lightning_npu_tp.checkpoint.saves import Saves
from lightning_npu_tp.devices.device import NPU
from lightning_npu_tp.devices.fault_text import find_fault
from lightning_npu_tp.devices.launch_queue import require_launch_queue
from lightning_npu_tp.errors import CheckpointError
from lightning_npu_tp.launch.preemption import Preemption
from lightning_npu_tp.launch.signals import TERMINATED
from lightning_npu_tp.models.families.family import ModelFamily
from lightning_npu_tp.models.families.registry import FAMILIES
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.trainer.checkpoint_settings import CheckpointSettings
from lightning_npu_tp.trainer.resume import Resume, restore_finetuning, save_last_step
from lightning_npu_tp.weights.load import leave_to_checkpoint

# Found by ckpt_path="auto", as it is the newest.
PREEMPTED = "preempted.ckpt"


class CheckpointHooks(ParallelStrategy):
    """What of the strategy concerns checkpoints. A subclass calls `_set_up_checkpoints` and has the rest."""

    _preemption: Preemption | None = None
    _flushing = False
    # What the trainer call was given: "auto", "last", "best" or a path; the launcher notes it.
    asked_checkpoint: str | None = None
    # What "auto" has found, once it has looked.
    _found: tuple[Path | None] | None = None
    _families: Sequence[ModelFamily]
    _timeout: timedelta

    @property
    def layout(self) -> Layout:
        """Sizes of this run's axes data, tensor and expert."""
        raise NotImplementedError

    @property
    def _module(self) -> LightningModule:
        raise NotImplementedError

    def process_group(self) -> AbstractContextManager[None]:
        """Have the process group outside of a Trainer method."""
        raise NotImplementedError

    def _set_up_checkpoints(self, settings: CheckpointSettings) -> None:
        self._checkpoints = settings
        self._saves = Saves(stop=settings.on_save_error == "stop")
        self._deferred = DeferredSaves()
        # A fit's own; `setup` makes it and gives it to the loops.
        self._resume = Resume()
        # Collectives of a save in the background must not mix with those of training.
        self._save_group: dist.ProcessGroup | None = None

    @property
    def checkpoint_settings(self) -> CheckpointSettings:
        """How checkpoints are saved and loaded."""
        return self._checkpoints

    # --- saving --------------------------------------------------------------------------------

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's shards of the module's parameters and buffers, by name."""
        # Lightning collects this first: host memory then never holds two checkpoints.
        self.wait_for_checkpoints()
        with self.process_group():
            return training_state.model_state(self._module)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's shards of an optimizer's state, by parameter name."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        with self.process_group():
            return training_state.optimizer_state(self._module, optimizer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the trainer's state, or begin to with `async_save`; every rank calls it.

        With optimizer states, between accumulated micro-batches or inside of one, it is written at the end of that
        optimizer step instead, with the state of then: what was accumulated is in no checkpoint. A run that fails saves
        at once and says what is lost.

        Raises CheckpointError on every rank, or warns with on_save_error="continue", if it failed on any; with
        `async_save` that is at the next save or at the end of the fit.
        """
        if storage_options is not None:
            raise CheckpointError(
                "storage_options is not supported: checkpoints are written by torch.distributed.checkpoint and not by "
                "a CheckpointIO. Leave it out."
            )
        trainer = self._module.trainer
        if "optimizer_states" in checkpoint and step_is_half_made(trainer):
            if goes_on(trainer) and not self._flushing:
                self._deferred.add(Path(os.path.abspath(self.broadcast(filepath))))
                rank_zero_info(f"{filepath} was asked for within an optimizer step; it is saved at the step's end.")
                return
            rank_zero_warn(
                f"{filepath} is saved within the optimizer step after step {trainer.global_step}. Gradients are not in "
                f"a checkpoint: a run that resumes from it leaves out the micro-batches of that step."
            )
        after_the_run = not dist.is_initialized()
        with self.process_group():
            path = Path(os.path.abspath(self.broadcast(filepath)))
            background = self._checkpoints.async_save and not after_the_run
            if background and self._save_group is None:
                self._save_group = dist.new_group(backend="gloo", timeout=self._timeout)
            save = self._prepared(checkpoint, path, Peers(self._save_group if background else None), copy=background)
            self._require_card(path)
            self._saves.run(path, save, background=background)

    def _prepared(self, checkpoint: dict[str, Any], path: Path, peers: Peers, *, copy: bool) -> Any:
        """A function that saves `checkpoint` as it is now. copy: though training goes on meanwhile."""
        module = self._module
        manifest = identity.manifest_of(module.trainer, module, self.layout, self._known_families, checkpoint)
        own = rank_state.collect_rank_state(module.trainer)
        if self._resume.validating is not None:
            own["random"] = self._resume.validating["random"]
        if copy:
            checkpoint = checkpoint | {
                name: training_state.detached(checkpoint[name], module, self.optimizers)
                for name in ("state_dict", "optimizer_states")
                if name in checkpoint
            }
        tensors, rest = training_state.split(checkpoint)
        content = writer.serialized(rest) if self.is_global_zero else b""
        more = identity.tokenizer_contents(manifest) if self.is_global_zero else {}
        return partial(writer.save_folder, tensors, content, writer.serialized(own), path, manifest, peers, more)

    def _require_card(self, path: Path) -> None:
        """Raise CheckpointError on every rank if some card no longer gets its work: what it gave is not what it has."""
        if self.root_device.type != NPU:
            return
        try:
            Peers().each(partial(require_launch_queue, self.root_device))
        except PeerFailure as failure:
            fault = find_fault(failure.words())
            meaning = "" if fault is None else f" {fault.sentence()}"
            raise CheckpointError(
                f"The checkpoint {path} is not saved, because it would not hold what was trained: {failure.words()}"
                f"{meaning} Earlier checkpoints are as they were."
            ) from None

    @property
    def _known_families(self) -> tuple[ModelFamily, ...]:
        return (*self._families, *FAMILIES)

    def save_when_preempted(self) -> Preemption | None:
        """What a SIGTERM of the running trainer call is to be told; None where there is nothing to save, or nowhere."""
        self._preemption = None
        trainer = self._module.trainer
        if trainer.state.fn == TrainerFn.FITTING and self._checkpoints.save_on_sigterm and choose.folders_of(trainer):
            self._preemption = Preemption()
        return self._preemption

    def _save_deferred(self) -> None:
        """Save what was asked for within the step, and remove what was to make room for it."""
        saves, removals = self._deferred.take()
        self._flushing = True
        try:
            for path in saves:
                self._module.trainer.save_checkpoint(path)
            for path in removals:
                self.remove_checkpoint(path)
        finally:
            self._flushing = False

    def after_step(self) -> None:
        """At the end of every optimizer step: save what waits; if the job is to end, save and end it on all ranks."""
        self._save_deferred()
        trainer = self._module.trainer
        if self._preemption is None or not self._preemption.due(trainer.global_step):
            return
        path = choose.folders_of(trainer)[0] / PREEMPTED
        rank_zero_info(f"Asked to end by SIGTERM after step {trainer.global_step}: saving {path}.")
        try:
            trainer.save_checkpoint(path)
            self.wait_for_checkpoints()
        except CheckpointError as error:
            # The job has to end all the same, and the checkpoint before this one is there.
            rank_zero_warn(str(error))
        raise SIGTERMException(TERMINATED)

    def wait_for_checkpoints(self) -> None:
        """Return once no checkpoint is being written. Raises CheckpointError if that failed, or warns."""
        self._saves.wait()

    @override
    def on_train_end(self) -> None:
        """Have every checkpoint on disk, that of the last step too, and say again which are missing."""
        save_last_step(self._module.trainer)
        # Where training was stopped within a step, that step never ends.
        self._save_deferred()
        self.wait_for_checkpoints()
        self._saves.report()

    def _end_saves(self) -> None:
        """Before the process group goes, whatever happened: let a save in flight come to its end."""
        try:
            self.wait_for_checkpoints()
        except Exception as error:
            # Something else may be on its way up already.
            rank_zero_warn(str(error))
        if self._save_group is not None and dist.is_initialized():
            dist.destroy_process_group(self._save_group)
        self._save_group = None

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        """Delete a checkpoint, after the save in flight and only if that is good; rank 0 does it."""
        path = Path(os.path.abspath(filepath))
        if not self._deferred.remove(path) and self.is_global_zero:
            self._saves.remove(path)

    # --- loading -------------------------------------------------------------------------------

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        """True: the shards that a checkpoint is loaded into exist after setup only."""
        return True

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        """False: `load_checkpoint` loads the optimizers' states."""
        return False

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and, while fitting, optimizer states and this rank's own state; returns the rest.

        Raises CheckpointError on every rank for a checkpoint that is incomplete, damaged or of another model.
        """
        peers, settings = Peers(), self._checkpoints
        asked, self.asked_checkpoint = self.asked_checkpoint, None
        word = asked if asked in (choose.AUTO, choose.LAST, choose.BEST) else None
        if word is not None:
            chosen = self._chosen(word, Path(checkpoint_path), peers)
            if chosen is None:
                # What Lightning would say that it restored.
                self._module.trainer.ckpt_path = None
                return choose.NoCheckpoint({"pytorch-lightning_version": lightning.__version__})
            checkpoint_path = chosen
        path, manifest = reader.open_checkpoint(
            # Rank 0 has compared the checksums of what it chose.
            Path(self.broadcast(checkpoint_path)),
            peers,
            checksums=settings.verify and word is None,
        )
        # Lightning drops fit(weights_only=…) on this path, so the strategy has a setting of its own.
        trusted = settings.trusted if weights_only is None else weights_only
        state = reader.read_object(path, trusted) if path.is_file() else reader.read_rest(path, trusted)
        trainer = self._module.trainer
        if manifest is not None:
            current = identity.manifest_of(trainer, self._module, self.layout, self._known_families, {})
            identity.require_same_model(path, manifest, current, allow_other_tokenizer=settings.allow_other_tokenizer)
        resumes = trainer.state.fn == TrainerFn.FITTING and not settings.resume_weights_only
        if resumes:
            restore_finetuning(trainer, state.get("callbacks", {}))
        training_state.load_tensors(
            path,
            state,
            self._module,
            self.optimizers if resumes else [],
            strict=self._module.strict_loading,
            peers=peers,
        )
        if resumes and manifest is not None:
            self._restore_rank_state(path, manifest, trusted, state)
        reader.require_unchanged(path, manifest, peers)
        if settings.resume_weights_only and trainer.state.fn == TrainerFn.FITTING:
            rank_zero_info(f"Starting anew from the weights of {path} (strategy.resume_weights_only).")
            return training_state.without_progress(state, getattr(trainer, "datamodule", None))
        return state

    def leave_weights_to_checkpoint(self) -> None:
        """Before conversion: have no weights read from files where `load_checkpoint` brings every one of them.

        That is so for a path, for "best", and for "auto" if it finds a checkpoint (of "last" Lightning says only later
        whether there is one), unless the module lets a checkpoint lack weights (strict_loading=False).
        """
        asked, trainer = self.asked_checkpoint, self._module.trainer
        self._found = None
        if asked in (None, choose.LAST) or not self._module.strict_loading:
            return
        if asked == choose.AUTO:
            checksums = self._checkpoints.verify
            found = Peers().main(lambda: choose.choose(trainer, choose.AUTO, Path(), checksums=checksums))
            self._found = (found,)
            if found is None:
                return
        leave_to_checkpoint(self._module)

    def _chosen(self, word: str, path: Path, peers: Peers) -> Path | None:
        """The checkpoint that auto, last or best means; rank 0 looks, its errors are raised on every rank."""
        trainer = self._module.trainer
        (found,) = self._found or (
            peers.main(lambda: choose.choose(trainer, word, path, checksums=self._checkpoints.verify)),
        )
        self._found = None
        if word == choose.AUTO:
            rank_zero_info("No complete checkpoint yet: starting anew." if found is None else f"Going on from {found}.")
        return found

    def _restore_rank_state(
        self, path: Path, manifest: Manifest, trusted: bool | None, checkpoint: dict[str, Any]
    ) -> None:
        """Give every rank what the rank of its number had saved, in the same layout; in another, what all had alike.

        checkpoint: what Lightning goes on with; holds rank 0's positions of data loaders.
        """
        trainer = self._module.trainer
        current = {"data": self.layout.data, "tensor": self.layout.tensor, "expert": self.layout.expert}

        def read(rank: int) -> dict[str, Any]:
            return reader.read_object(path / writer.rank_file(rank), trusted)

        if manifest.layout == current:
            own = read(self.global_rank)
            rank_state.apply_rank_state(trainer, own)
            rank_state.use_own_loaders(checkpoint, own)
            self._resume.inside = own
            return
        rank_state.use_common_loaders(checkpoint, [read(rank) for rank in range(manifest.world)])
        rank_zero_info(
            f"{path} was saved in the layout {manifest.layout}: the states of its ranks' random generators are not "
            f"taken over."
        )

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let the first batch of a resumed run draw the random numbers that it would have drawn."""
        self._resume.before_batch(self._module.trainer, batch_idx)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: `load_checkpoint` has loaded the weights."""

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: `load_checkpoint` has loaded the optimizers' states."""
