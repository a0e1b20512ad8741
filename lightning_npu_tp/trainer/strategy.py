"""The Lightning strategy: process group, meshes, conversion, precision, clipping, checkpoints, teardown.

A thin layer that calls the parts at the right moment of a trainer's life; process groups and what ranks tell each
other: group_hooks.py, checkpoints: checkpoint_hooks.py.
It derives from ParallelStrategy and not from Lightning's ModelParallelStrategy: the connector refuses 64-true and
16-mixed for instances of that class before a subclass is asked, and most of its methods would be
overridden (its mesh has no expert axis, its reductions count every tensor rank, it wipes loaded
weights). What is kept is its contract: `device_mesh`, the sampler arguments, the checkpoint layout.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, Never

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning_utilities.core.rank_zero import rank_zero_only as utils_rank_zero_only
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_npu_tp import kernels as kernel_choice
from lightning_npu_tp.checkpoint.choose import asked_for
from lightning_npu_tp.convert.carry_over import kept_on_parameters
from lightning_npu_tp.convert.convert import Options, convert, materialize_rest, rebind_converted
from lightning_npu_tp.convert.data_parallel import (
    DataParallel,
    reset_after_failed_step,
    reshard_idle,
)
from lightning_npu_tp.devices.device import idle_npus
from lightning_npu_tp.devices.hccl_settings import HcclSettings
from lightning_npu_tp.devices.launch_queue import (
    expect_unwinding,
    launch_queue_has_ended,
)
from lightning_npu_tp.errors import ConfigError, ConversionError
from lightning_npu_tp.launch.hosts import crossings
from lightning_npu_tp.launch.launcher import ProcessLauncher, check_world
from lightning_npu_tp.launch.process_group import host_watch
from lightning_npu_tp.launch.same_settings import require_equal_batches
from lightning_npu_tp.models.families.family import ModelFamily
from lightning_npu_tp.models.families.registry import supported
from lightning_npu_tp.parallel.layout import Dispatch, Layout, Meshes, Size, resolve_dispatch
from lightning_npu_tp.parallel.recompute import Recompute
from lightning_npu_tp.parallel.whole_values import WholeValues
from lightning_npu_tp.trainer import equal_ends, module_setup
from lightning_npu_tp.trainer.checkpoint_settings import CheckpointSettings, OnSaveError, refuse_removed
from lightning_npu_tp.trainer.early_references import follow_parameters, note_parameters
from lightning_npu_tp.trainer.even_batches import seed_workers_by_data_rank, without_repeated_samples
from lightning_npu_tp.trainer.explain_error import may_hang, noted
from lightning_npu_tp.trainer.group_hooks import GroupHooks
from lightning_npu_tp.trainer.loops import evaluate_without_inference_mode, install_loops, move_results_to_host
from lightning_npu_tp.trainer.lost_updates import LostUpdates
from lightning_npu_tp.trainer.optimizers import choose_implementations, refuse_optimizers
from lightning_npu_tp.trainer.precision import precision_dtype, rebuild_precision
from lightning_npu_tp.trainer.registration import OTHER_IMPORT
from lightning_npu_tp.trainer.resume import Resume, end_finetuning_restart
from lightning_npu_tp.trainer.start_table import summary_table
from lightning_npu_tp.trainer.teardown import close_all

UserConversion = Callable[[LightningModule, Meshes], None]


class NPUTensorParallelStrategy(GroupHooks):
    """Shards transformers models found in any LightningModule over tensor and expert ranks.

    Works on npu, cuda and cpu: `Trainer(accelerator="cpu", devices=2, strategy="npu_tp")` or with an
    instance. A model may come from the meta device, from random initialisation or from_pretrained;
    weights that exist are kept.

    Args:
        accelerator: optional; then leave `Trainer(accelerator=…)` at "auto".
        data_parallel_size, tensor_parallel_size, expert_parallel_size: "auto" or a number. auto: all
            devices tensor-parallel, experts as many as tensor ranks.
        data_parallel: "shard" (FSDP2: each data rank keeps a slice of everything) or "replicate".
        sequence_parallel: keep a slice of each sequence per tensor rank between regions; saves memory.
        dispatch: how tokens reach their experts: "auto", "replicated" or "all_to_all".
        recompute: what the backward pass computes again: "none", "moe" (hidden activations of the routed
            experts) or "block" (all of a decoder layer).
        convert: `convert(lightning_module, meshes)`, instead of the built-in conversion, for a
            module of your own; it gives parameters their shards in place.
        families: ModelFamily records of your own, tried before the built-in ones.
        kernels: overrides of the kernels chosen for the device, e.g. {"grouped_matmul": "reference"}.
        timeout_s: seconds until a collective, or the meeting of the ranks, gives up.
        hccl: settings applied to the environment before the process group exists.
        checkpoint_weights_only: passed on when the trainer says nothing; False trusts the file.
        async_save: training waits for the copy to host memory only; writing goes on beside it.
        on_save_error: "stop" the run when a checkpoint cannot be saved, or "continue" with a warning.
        verify_checkpoints: compare the checksums of all files before loading.
        resume_weights_only: take only the weights of fit(ckpt_path=…); optimizers and step count begin anew.
        allow_other_tokenizer: load a checkpoint that was trained with another tokenizer.
        save_on_sigterm: finish the optimizer step, save preempted.ckpt where ModelCheckpoint saves, and exit with 143;
            False ends at once.
        sigterm_grace_s: seconds that this may take before the processes are ended.
        init_seed: of the weights of parameters on the meta device; None takes torch's initial seed.
        cluster_environment, process_group_backend: as in Lightning's other strategies.

    """

    strategy_name = "npu_tp"
    # The accelerator connector asks for it: samplers are then made distributed.
    is_distributed = True

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        data_parallel_size: Size = "auto",
        tensor_parallel_size: Size = "auto",
        expert_parallel_size: Size = "auto",
        data_parallel: DataParallel = "shard",
        sequence_parallel: bool = False,
        dispatch: Dispatch = "auto",
        recompute: Recompute = "none",
        convert: UserConversion | None = None,
        families: Sequence[ModelFamily] = (),
        kernels: Mapping[str, str | None] | None = None,
        timeout_s: float = 7200.0,
        hccl: HcclSettings | None = None,
        checkpoint_weights_only: bool | None = None,
        async_save: bool = False,
        on_save_error: OnSaveError = "stop",
        verify_checkpoints: bool = True,
        resume_weights_only: bool = False,
        allow_other_tokenizer: bool = False,
        save_on_sigterm: bool = True,
        sigterm_grace_s: float = 60.0,
        init_seed: int | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        process_group_backend: str | None = None,
        precision_plugin: Precision | None = None,
        **removed: Never,
    ) -> None:
        refuse_removed(removed)
        super().__init__(
            accelerator=accelerator, cluster_environment=cluster_environment, precision_plugin=precision_plugin
        )
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s={timeout_s} is not a positive number of seconds. Set strategy.timeout_s.")
        self._sizes = {"data": data_parallel_size, "tensor": tensor_parallel_size, "expert": expert_parallel_size}
        self._options = Options(
            sequence_parallel=sequence_parallel, dispatch=dispatch, recompute=recompute, data_parallel=data_parallel
        )
        self._convert = convert
        self._families = tuple(families)
        self._kernel_overrides = dict(kernels or {})
        self._set_up_checkpoints(
            CheckpointSettings(
                trusted=checkpoint_weights_only,
                async_save=async_save,
                on_save_error=on_save_error,
                verify=verify_checkpoints,
                resume_weights_only=resume_weights_only,
                allow_other_tokenizer=allow_other_tokenizer,
                save_on_sigterm=save_on_sigterm,
                sigterm_grace_s=sigterm_grace_s,
            )
        )
        self._set_up_groups(timeout=timedelta(seconds=timeout_s), hccl=hccl, backend=process_group_backend)
        self._init_seed = init_seed
        self._layout: Layout | None = None
        self._card_failed = False
        self.num_nodes = 1

    # --- what the connector asks while the Trainer is built -----------------------------------

    @property
    def num_processes(self) -> int:
        """Processes on this host."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    @override
    def root_device(self) -> torch.device:
        """This rank's device."""
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    # mypy does not see the decorator of a property that has a setter.
    @property  # type: ignore[explicit-override]
    @override
    def precision_plugin(self) -> Precision:
        """The precision plugin, made for this run's device type."""
        return super().precision_plugin

    @precision_plugin.setter
    @override
    def precision_plugin(self, plugin: Precision | None) -> None:
        # The connector builds mixed precision for "cuda" whatever an outside accelerator is; its
        # autocast would then do nothing. The devices are not known yet when __init__ comes here.
        devices = getattr(self, "parallel_devices", None)
        if plugin is not None and devices:
            plugin = rebuild_precision(plugin, devices[0].type)
        self._precision_plugin = plugin

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        # The devices came after the precision plugin.
        self.precision_plugin = self._precision_plugin
        check_world(self.cluster_environment, self.num_processes, self.num_nodes)
        self._resolve_layout()
        # Lightning says it of its samplers; `process_dataloader` has mended what it warns of.
        warnings.filterwarnings("ignore", "Using `DistributedSampler` with the dataloaders")
        if hint := idle_npus(self.root_device.type):
            rank_zero_warn(hint)
        # On the ranks that somebody else started as well: it is what ends them all when one fails.
        self._launcher = ProcessLauncher(
            self.cluster_environment, self.num_processes, self.num_nodes, self._around_call
        )

    @contextmanager
    def _around_call(self, call: partial[Any], trainer: Trainer | None) -> Iterator[None]:
        """What a trainer call runs inside of: notes which checkpoint it was given, and explains what it raises."""
        self.asked_checkpoint = asked_for(call.func, call.args, call.keywords)
        try:
            with WholeValues():
                yield
        except (RuntimeError, ConnectionError) as error:
            expect_unwinding(error)
            explained = noted(error, trainer)
            try:
                if explained is error:
                    raise
                raise explained from None
            finally:
                # The error knows this frame. Knowing each other they would keep what the failed step held on the card
                # until Python collects cycles, and a smaller batch that is tried next would not fit.
                del explained

    def set_world_ranks(self) -> None:
        """Tell the cluster environment and the logging helpers which rank this is."""
        assert self.cluster_environment is not None
        self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = utils_rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def _resolve_layout(self) -> Layout:
        self._layout = Layout.resolve(world=self.num_nodes * self.num_processes, **self._sizes)
        resolve_dispatch(self._layout, self._options.dispatch)
        return self._layout

    @property
    def options(self) -> Options:
        """How the layout is used."""
        return self._options

    @property
    @override
    def layout(self) -> Layout:
        """Sizes of this run's axes."""
        return self._layout or self._resolve_layout()

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Ranks of one data rank see the same batches."""
        return {"num_replicas": self.layout.data, "rank": self.global_rank // self.layout.tensor}

    @override
    def process_dataloader(self, dataloader: Any) -> Any:
        """Let an evaluation see each sample once, in as many batches on every data rank; seed workers by data rank."""
        seed_workers_by_data_rank(dataloader, self.global_rank // self.layout.tensor)
        return without_repeated_samples(dataloader)

    # --- process group -------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        """Bind the device, meet the other ranks, build the meshes."""
        super().setup_environment()
        reset_seed()
        self.set_world_ranks()
        self._open()
        module = self.lightning_module
        assert module is not None
        # Users read it in `configure_model`.
        module._device_mesh = self.meshes.dense
        module_setup.refuse_pruning(module.trainer)
        if averaging := module_setup.averaging_callbacks(module.trainer):
            if self.layout.data > 1:
                raise ConfigError(
                    f"{type(averaging[0]).__name__} copies the model, which FSDP forbids for a model that is shared "
                    f"over {self.layout.data} data ranks. Leave the callback out, or set strategy.data_parallel_size=1."
                )
            module_setup.configure_early(module.trainer, module)
            self._convert_models(module)

    # --- setup and teardown --------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer) -> None:
        """Convert and shard what the module holds, then build the optimizers."""
        assert self.model is not None and self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        module = self.lightning_module
        module_setup.refuse_fsdp1(module)
        if trainer._detect_anomaly:
            module_setup.let_anomaly_detection_read_shards()
        module_setup.let_equal_compare_shards()
        self.leave_weights_to_checkpoint()
        self._convert_models(module)
        if self.world_size > 1:
            module_setup.share_plain_tensors(module, self.root_device)
        module_setup.count_samples_once(module, self._groups)
        with kept_on_parameters(module):
            self.model = self.precision_plugin.convert_module(self.model)
            self.model_to_device()
        self.barrier("setup")
        if trainer.state.fn == TrainerFn.FITTING:
            for callback in module_setup.averaging_callbacks(trainer):
                callback.setup(trainer, module, "fit")
            self.optimizers, self.lr_scheduler_configs = [], []
            self.setup_optimizers(trainer)
            refuse_optimizers(self.optimizers, str(self.precision_plugin.precision))
            self._lost_updates = LostUpdates()
            plain = module_setup.plain_parameters(module)
            choose_implementations(self.optimizers, plain, self.root_device.type)
        if self.layout.data > 1:
            evaluate_without_inference_mode(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)
            self._resume = Resume()
            install_loops(trainer, self._resume)

    def _convert_models(self, module: LightningModule) -> None:
        self._converted_before = rebind_converted(module, self.meshes)
        before = note_parameters(module)
        seed = torch.initial_seed() if self._init_seed is None else self._init_seed
        if self._convert is not None:
            if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
                self._convert(module, self.meshes)
        else:
            found = convert(
                module,
                meshes=self.meshes,
                groups=self._groups,
                kernels=kernel_choice.select(self.root_device.type, self._kernel_overrides),
                families=self._families,
                device=self.root_device,
                dtype=precision_dtype(self.precision_plugin),
                seed=self.broadcast(seed),
                options=self._options,
            )
            if found:
                hosts = self._crossings()
                rank_zero_info(summary_table(found, self._options, self.meshes, self.root_device.type, hosts))
        if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            names = [*(family.name for family in self._families), *supported()]
            inside = sorted({type(child).__name__ for child in module.children()}) or ["nothing"]
            raise ConversionError(
                f"{type(module).__name__} holds no model that can be sharded (it has {', '.join(inside)}). Supported "
                f"model types: {', '.join(names)}. For a model of your own pass a ModelFamily in families=, or a "
                f"function in convert=, to NPUTensorParallelStrategy."
            )
        materialize_rest(module, device=self.root_device, seed=seed)
        follow_parameters(module, before)

    def _crossings(self) -> list[str]:
        watch = host_watch()
        return [] if watch is None else crossings(watch.hosts, self.layout)

    @override
    def model_to_device(self) -> None:
        """Move what is not on the device yet."""
        assert self.model is not None
        self.model.to(self.root_device)

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Weights made inside `configure_model` stay on the CPU, or on meta when asked for."""
        with torch.device("meta") if empty_init else nullcontext(), self.precision_plugin.tensor_init_context():
            yield

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Note whether this rank's card can still be asked for anything."""
        self._card_failed = self.root_device.type != "cpu" and may_hang(exception)

    @override
    def teardown(self) -> None:
        """Give back device memory and destroy the process group."""
        assert self.cluster_environment is not None and self.accelerator is not None
        module = self.lightning_module
        trainer = None if module is None else module._trainer
        failing = trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED
        lost = self._card_failed or launch_queue_has_ended()
        self._card_failed = False
        if failing:
            assert trainer is not None
            move_results_to_host(trainer, lost=lost)

        def module_to_cpu() -> None:
            # After a failed conversion there is nothing to move, and the attempt would hide why it failed.
            if module is not None and not any(parameter.is_meta for parameter in module.parameters()):
                if failing:
                    reset_after_failed_step(module)
                with kept_on_parameters(module):
                    module.cpu()

        to_cpu = (lambda: _optimizers_to_device(self.optimizers, torch.device("cpu")), module_to_cpu)
        steps: tuple[Callable[[], object], ...] = (
            # What a card has that failed, or waits for a rank that did, does not come back; asking may take for ever.
            *(() if lost else to_cpu),
            self.cluster_environment.teardown,
            self.precision_plugin.teardown,
            *(() if lost else (self.accelerator.teardown,)),
            self.checkpoint_io.teardown,
            lambda: self._close(failing=failing),
        )
        close_all(steps, failing=failing)

    @override
    def on_train_start(self) -> None:
        """Refuse data ranks with different numbers of batches; warn of mixtures that would not train as such."""
        trainer = self._module.trainer
        end_finetuning_restart(trainer)
        needed = trainer.max_steps * trainer.accumulate_grad_batches if trainer.max_steps >= 0 else math.inf
        require_equal_batches(trainer.num_training_batches, layout=self.layout, batches_needed=needed)
        module_setup.warn_of_eval_mode(self._module)

    @override
    def __repr__(self) -> str:
        """Its name, and beside pytorch_lightning, whose Trainer refuses it and shows this, which import it needs."""
        return f"<{type(self).__name__}{f': {OTHER_IMPORT}' if 'pytorch_lightning' in sys.modules else ''}>"

    def before_epoch(self) -> None:
        """Before the batches of an epoch: refuse ranks of which some have none, and see to new parameter groups."""
        plain = module_setup.plain_parameters(self._module)
        choose_implementations(self.optimizers, plain, self.root_device.type)
        equal_ends.before_batches(self._module.trainer, self.layout, self.options)

    @override
    def on_validation_start(self) -> None:
        """Refuse ranks with different numbers of batches; so do the test and the prediction."""
        equal_ends.before_batches(self._module.trainer, self.layout, self.options)

    @override
    def on_test_start(self) -> None:
        """Refuse ranks with different numbers of batches."""
        self.on_validation_start()

    @override
    def on_predict_start(self) -> None:
        """Refuse ranks with different numbers of batches."""
        self.on_validation_start()

    @override
    def on_validation_end(self) -> None:
        """Give up what the evaluation has gathered; so do the test and the prediction."""
        reshard_idle(self._module)

    @override
    def on_test_end(self) -> None:
        """Give up what the test has gathered."""
        self.on_validation_end()

    @override
    def on_predict_end(self) -> None:
        """Give up what the prediction has gathered."""
        self.on_validation_end()

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int | None = None) -> Any:
        """Move a batch to the device, once it is known that every rank has one."""
        if dataloader_idx is not None:
            equal_ends.at_batch(self._module.trainer, self.layout, self.options, dataloader_idx)
        return super().batch_to_device(batch, device, dataloader_idx)

    @property
    @override
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None, "no trainer call has connected a module yet"
        return self.lightning_module
