"""What of the strategy concerns process groups: opened, closed, and what ranks tell each other over them.

The groups live as long as a trainer call; the meshes keep their names, so that what was converted in one call works in
the next. A value of a data rank counts once, however many tensor ranks hold it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_npu_tp.convert.data_parallel import (
    average_plain_gradients,
    rebind_groups,
    reduce_gradients,
    release_groups,
    reshard_idle,
)
from lightning_npu_tp.devices.device import NPU, backend_for
from lightning_npu_tp.devices.hccl_settings import HcclSettings, SettingsReport
from lightning_npu_tp.devices.launch_queue import (
    unwatch_launch_queue,
    watch_launch_queue,
)
from lightning_npu_tp.devices.terminate_message import clear_terminate_message, set_terminate_message, terminate_message
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.launch.launcher import ProcessLauncher
from lightning_npu_tp.launch.process_group import close_process_group, open_process_group
from lightning_npu_tp.launch.same_settings import require_agreement, run_settings
from lightning_npu_tp.parallel.collectives import group_size
from lightning_npu_tp.parallel.layout import Groups, Meshes
from lightning_npu_tp.parallel.whole_values import WholeValues
from lightning_npu_tp.trainer import module_setup
from lightning_npu_tp.trainer.checkpoint_hooks import CheckpointHooks
from lightning_npu_tp.trainer.data_mean import reduce_over_data
from lightning_npu_tp.trainer.explain_error import noted
from lightning_npu_tp.trainer.lost_updates import LostUpdates
from lightning_npu_tp.trainer.teardown import close_all
from lightning_npu_tp.trainer.tensor_ranks import TensorRanks


class GroupHooks(CheckpointHooks):
    """Process groups, meshes and collectives of the strategy. A subclass calls `_set_up_groups` and has the rest."""

    _lost_updates: LostUpdates

    def _set_up_groups(self, *, timeout: timedelta, hccl: HcclSettings | None, backend: str | None) -> None:
        self._timeout = timeout
        self._hccl = hccl
        self._hccl_report: SettingsReport | None = None
        self._hccl_told: list[str] = []
        self._backend = backend
        self._groups = Groups()
        self._tensor_ranks: TensorRanks
        self._converted_before: list[Groups] = []
        self._reduces_gradients = True

    # --- open and close ------------------------------------------------------------------------

    @property
    def meshes(self) -> Meshes:
        """The device meshes; they exist from `setup_environment` to `teardown`."""
        if self._groups.meshes is None or not dist.is_initialized():
            raise ConfigError("The device meshes exist only while a Trainer method runs, after its setup_environment.")
        return self._groups.meshes

    @property
    def groups(self) -> Groups:
        """The process groups that the converted modules use."""
        return self._groups

    def _open(self) -> None:
        close_process_group()
        if self._hccl is not None and self.root_device.type == NPU:
            self._hccl_report = self._hccl.apply()
            if (lines := self._hccl_report.lines()) != self._hccl_told:
                # Once, not for each trainer call.
                self._hccl_told = lines
                rank_zero_info("\n".join(lines))
        backend = self._backend or backend_for(self.root_device.type)
        assert self.cluster_environment is not None
        hccl = self._hccl or HcclSettings()
        buffers_mb = hccl.buffers_mb(self.layout.axes_of_all)
        open_process_group(
            self.cluster_environment,
            backend=backend,
            timeout=self._timeout,
            device=self.root_device,
            buffer_mb=buffers_mb.pop("world", None),
            hint=self._launcher.hint if isinstance(self._launcher, ProcessLauncher) else "",
        )
        if self.root_device.type != "cpu":
            # gloo has no thread that ends the process.
            set_terminate_message(terminate_message(self.global_rank, socket.gethostname()))
        module = self.lightning_module
        if self.root_device.type == NPU and isinstance(self._launcher, ProcessLauncher):
            trainer = None if module is None else module._trainer
            watch_launch_queue(self.root_device, partial(self._end_unheard, trainer=trainer))
        if module is not None and module._trainer is not None:
            require_agreement(run_settings(module.trainer, module, self))
        meshes = Meshes.build(self.layout, self.root_device.type, timeout=self._timeout, buffers_mb=buffers_mb)
        for groups in (self._groups, *self._converted_before):
            groups.bind(meshes)
        self._tensor_ranks = TensorRanks(self.layout, self.global_rank, self._timeout)
        # Before the user's hooks, which may draw: a split of a data set, weights.
        self._tensor_ranks.share_generators(self.root_device)

    @contextmanager
    @override
    def process_group(self) -> Iterator[None]:
        """Have the process group outside of a Trainer method; every rank enters it.

        After a fit the ranks have parted; inside this context a sharded model can be called, and
        checkpoints written.
        """
        if dist.is_initialized():
            yield
            return
        self._open()
        rebind_groups(self.lightning_module)
        try:
            with WholeValues():
                yield
        finally:
            self._close()

    def _close(self, *, failing: bool = False) -> None:
        def undo_settings() -> None:
            if self._hccl_report is not None:
                self._hccl_report.undo()
                self._hccl_report = None

        groups = [groups.close for groups in (self._groups, *self._converted_before)]
        steps: tuple[Callable[[], object], ...] = (
            self._end_saves,
            *groups,
            partial(release_groups, self.lightning_module),
            close_process_group,
            unwatch_launch_queue,
            clear_terminate_message,
            undo_settings,
        )
        close_all(steps, failing=failing)

    def _end_unheard(self, error: BaseException, trainer: Trainer | None) -> None:
        """End this rank from another thread, with an error that the trainer's thread does not come to raise."""
        assert isinstance(self._launcher, ProcessLauncher)
        self._launcher.end_rank(noted(error, trainer))

    # --- gradients over data ranks -------------------------------------------------------------

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Add to the gradients without reducing them, for all micro-batches but a step's last."""
        self._reduces_gradients = False
        reduce_gradients(self._module, False)
        try:
            yield
        finally:
            reduce_gradients(self._module, True)
            self._reduces_gradients = True

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of layers that conversion left alone; FSDP has done the others."""
        if self._reduces_gradients and self.layout.data > 1:
            average_plain_gradients(module_setup.plain_parameters(self._module), self.meshes.data_group)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Make a step; forwards after it compute with what it has made."""
        optimizer = args[0] if args else kwargs["optimizer"]
        self._lost_updates.before(optimizer)
        result = super().optimizer_step(*args, **kwargs)
        self._lost_updates.after(optimizer)
        if self.layout.data > 1:
            reshard_idle(self._module)
        return result

    def token_groups(self) -> list[dist.ProcessGroup]:
        """Groups of ranks whose sum of a mixture layer's `tokens_per_expert` is the global count."""
        return [] if dist.group.WORLD is None else [dist.group.WORLD]

    # --- talking to the other ranks ------------------------------------------------------------

    @override
    def barrier(self, name: str | None = None) -> None:
        """Wait for every rank."""
        if not dist.is_initialized():
            return
        if name == "run-stage":
            # Once more, after hooks that drew or set a seed on some ranks only.
            self._tensor_ranks.share_generators(self.root_device)
        if name == "run-stage" and isinstance(self._launcher, ProcessLauncher):
            # Lightning has registered its signal handlers a moment ago; they broadcast and deadlock.
            preemption = self.save_when_preempted()
            if preemption is None:
                self._launcher.watch_signals()
            else:
                self._launcher.watch_signals(preemption.ask, grace_seconds=self.checkpoint_settings.sigterm_grace_s)
        if self.root_device.type == "cpu":
            dist.barrier()
        else:
            dist.barrier(device_ids=[self.root_device.index])

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int | None = None) -> Any:
        """Move a batch to the device; one that a loop takes from a loader is compared over the tensor ranks before.

        dataloader_idx: as the loops say it. Whoever else moves a batch may do so on one rank alone.
        """
        if dataloader_idx is not None and dist.is_initialized():
            trainer = self._module.trainer
            loop: Any = trainer._active_loop
            stage, number = trainer.state.stage, getattr(loop, "epoch_loop", loop).batch_progress.current.ready
            assert stage is not None, "a loop runs in a stage"
            self._tensor_ranks.require_same_batch(batch, stage=stage.value, loader=dataloader_idx, number=number)
        return super().batch_to_device(batch, device, dataloader_idx or 0)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Rank `src`'s picklable object, on every rank."""
        if not dist.is_initialized() or self.world_size == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Combine one value per data rank; tensor ranks saw the same samples and count once."""
        if not isinstance(tensor, Tensor) or not dist.is_initialized():
            return tensor
        return reduce_over_data(tensor, self.layout, self.meshes.data_group if group is None else group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """One value per data rank: [data, ...]."""
        if not dist.is_initialized():
            return tensor
        group = self.meshes.data_group if group is None else group
        if group_size(group) == 1:
            return tensor.unsqueeze(0) if sync_grads else tensor.detach().unsqueeze(0)
        return super().all_gather(tensor, group=group, sync_grads=sync_grads)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # noqa: A002
        """Whether all (or any) of the ranks decided so."""
        if not dist.is_initialized() or self.world_size == 1:
            return decision
        flag = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN if all else dist.ReduceOp.MAX)
        return bool(flag.item())
