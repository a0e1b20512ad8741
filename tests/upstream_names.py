"""Every private name of another library that the packages use: why, and what its loss would do.

test_upstream.py holds the list against our source and what is installed; for torch_npu tests/sim does the latter.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """Names of one owner with one reason.

    owner: dotted path of the module, class or function upstream. names: separated by spaces.
    why:   what they are needed for, public ways that do not do. loss: what happens when upstream drops them.
    """

    owner: str
    names: str
    why: str
    loss: str


LOOPS = "lightning.pytorch.loops"
_EPOCH_LOOP = f"{LOOPS}.training_epoch_loop._TrainingEpochLoop"
_STRATEGY = "lightning.pytorch.strategies.parallel.ParallelStrategy"
_CONNECTOR = "lightning.pytorch.trainer.connectors.logger_connector.logger_connector._LoggerConnector"
_SAVER = "lightning.pytorch.callbacks.ModelCheckpoint"
_TENSORBOARD = "lightning.pytorch.loggers.tensorboard.TensorBoardLogger"
_C10D = "torch.distributed.distributed_c10d"
FSDP = "torch.distributed.fsdp._fully_shard"
_HCCL = "torch_npu._C._distributed_c10d.ProcessGroupHCCL"

TORCH = (
    Names(
        "torch",
        "_assert_async",
        "An assertion that CUDA reports by itself; every public one reads the tensor on the host.",
        "AttributeError in the first forward pass on CUDA; kernels.vocabulary=reference does without.",
    ),
    Names(
        "torch",
        "_foreach_add_ _foreach_clamp_max_ _foreach_clamp_min_ _foreach_copy_ _foreach_mul_ _foreach_norm "
        "_foreach_zero_",
        "One launch for all gradients or biases; torch offers no public for-each operators.",
        "AttributeError in the step; a loop over the tensors computes the same, a launch each.",
    ),
    Names(
        "torch",
        "_amp_foreach_non_finite_check_and_unscale_",
        "Unscales local gradients and notes an overflow on the device; GradScaler does it on DTensors only one by one.",
        "AttributeError at the first step with precision=16-mixed.",
    ),
    Names(
        "torch.amp.grad_scaler.GradScaler",
        "_unscale_grads_",
        "The one place where an overflow of one rank can become everybody's.",
        "Silent: overridden under a name that nobody calls, ranks skip different steps and drift apart.",
    ),
    Names(
        "torch.nn.modules.module.Module",
        "_apply",
        "`.to(bfloat16)` and the like end there; a router's bias stays in float32.",
        "Silent: the router's bias is rounded to the weights' type.",
    ),
    Names(
        "torch.nn.modules.module.Module",
        "_modules _parameters _buffers",
        "Order of what a replaced module registered, by which optimizers match saved states; it has no public setter.",
        "AttributeError at conversion.",
    ),
    Names(
        "torch.Tensor",
        "_backward_hooks _post_accumulate_grad_hooks",
        "The tables of a parameter's hooks go over to the one that takes its place, so that handles still remove them.",
        "AttributeError at conversion.",
    ),
    Names(
        "torch.utils",
        "_pytree",
        "Tensors inside nested containers, as torch's own operators and checkpoints nest them; it has no public name.",
        "ImportError.",
    ),
    Names(
        "torch.utils",
        "_python_dispatch",
        "TorchDispatchMode sees every operator; there is no public name for it.",
        "ImportError in audit, prove and the testing kit.",
    ),
    Names(
        "torch.overrides",
        "_get_current_function_mode",
        "Whether the mode that is left for a model's forward is the innermost one; torch can only leave that.",
        "ImportError.",
    ),
    Names("torch.utils", "_device", "The module of `_device_constructors`.", "ImportError in audit."),
    Names(
        "torch.utils._device",
        "_device_constructors",
        "torch's own list of functions that make tensors: made without a device, they lie on the host.",
        "ImportError in audit; with a shorter list it would miss tensors that are made on the host.",
    ),
    Names(
        "torch",
        "_C",
        "Names of dispatch keys and the current autograd node.",
        "AttributeError in audit.",
    ),
    Names(
        "torch._C",
        "_current_autograd_node",
        "Whether an operator runs for a gradient, and for whose.",
        "AttributeError in audit.",
    ),
    Names(
        "torch.autograd",
        "_get_sequence_nr",
        "Leads from a node of the backward pass to the line of the forward pass that made it.",
        "AttributeError in audit; findings in backward passes could then name no line.",
    ),
    Names("torch.autograd.graph.Node", "_sequence_nr", "The other half of the above: a node's number.", "As above."),
    Names(
        "torch.autograd.graph",
        "_engine_run_backward",
        "The frame by which a stack is known to be inside backward().",
        "Silent: audit would name the line of `loss.backward()` for every finding in a backward pass.",
    ),
    Names(
        "torch._C",
        "_dispatch_has_kernel_for_dispatch_key _dispatch_get_all_op_names",
        "Which operators exist and which have a kernel for npu; torch's own tools ask the same way.",
        "AttributeError in audit's operator table and in the simulator's report.",
    ),
    Names(
        "torch._ops.OpOverload",
        "_op_dk",
        "Runs a composite operator from its parts, so that the dispatch mode sees these; no public way takes a key.",
        "AttributeError in audit.",
    ),
    Names(
        "torch._ops.OpOverload",
        "_schema",
        "Names of an operator's arguments: which one is the process group.",
        "AttributeError in the testing kit's count of traffic.",
    ),
    Names(
        "torch.ops.aten",
        "_is_any_true",
        "The one operator of anomaly detection that DTensor does not know.",
        "AttributeError with detect_anomaly; an operator that took its place would be refused by DTensor.",
    ),
    Names(
        "torch.UntypedStorage",
        "_checkpoint_offset",
        "Where a tensor's bytes lie in a checkpoint's file; described in torch's notes on serialization.",
        "AttributeError when a file's part is read, or None, which the sum refuses.",
    ),
)
DISTRIBUTED = (
    Names(
        "torch.distributed",
        "_composable",
        "`replicate` with FSDP2's interface; `fully_shard` alone always shards.",
        "ImportError at conversion.",
    ),
    Names(
        "torch.distributed.fsdp.FSDPModule",
        "_get_fsdp_state",
        "Way to the parameter groups: slices that get memory late, process groups that are closed and made anew.",
        "AttributeError at conversion.",
    ),
    Names(
        f"{FSDP}._fsdp_state.FSDPState",
        "_fsdp_param_groups _fsdp_param_group",
        "The groups themselves: a list since torch 2.13, one before.",
        "AttributeError at conversion.",
    ),
    Names(
        f"{FSDP}._fsdp_param_group.FSDPParamGroup",
        "_training_state",
        "Whether a group that is still gathered waits for a backward pass.",
        "AttributeError in the forward pass.",
    ),
    Names(
        "torch.distributed.fsdp",
        "_fully_shard",
        "The module of `TrainingState`; FSDP makes neither public.",
        "ImportError.",
    ),
    Names(FSDP, "_fsdp_common", "Likewise.", "Likewise."),
    Names(
        "torch.distributed.tensor.DTensor",
        "_op_dispatcher",
        "`torch.equal` of parameters of different meshes, which Lightning's finetuning callbacks ask for.",
        "AttributeError in setup.",
    ),
    Names(
        "torch.distributed.tensor.DTensor._op_dispatcher",
        "_custom_op_handlers",
        "Likewise: `register_sharding` comes after the refusal of different meshes.",
        "AttributeError in setup.",
    ),
    Names(
        f"{FSDP}._fsdp_state.FSDPState",
        "_lazy_init",
        "The model is FSDP's root, also where a part of it runs first; no public way says which module is.",
        "AttributeError at the first call over data ranks.",
    ),
    Names(
        f"{FSDP}._fsdp_state.FSDPState",
        "_training_state",
        "Whether a part is called from the forward that has gathered its parameters, or by itself.",
        "AttributeError at the first call over data ranks.",
    ),
    Names(
        "torch.distributed.ProcessGroupGloo",
        "_Options",
        "A mesh gives its groups torch's default time-out unless it is handed options.",
        "AttributeError on cpu.",
    ),
    Names(
        "torch._C._distributed_c10d.Backend.Options",
        "_timeout",
        "The run's time-out, for the groups of a mesh; read back by the warm-up, no public way reads it.",
        "Silent if it could still be set: groups of a mesh would wait for torch's default and not the run's.",
    ),
    Names(
        "torch.distributed.ProcessGroup",
        "_device_types _get_backend",
        "Way to a group's options, whose time-out the warm-up restores.",
        "AttributeError in the warm-up callback.",
    ),
    Names(
        _C10D,
        "_set_pg_timeout",
        "Communicators that are made for the first time may take longer than the run's time-out.",
        "AttributeError in the warm-up callback.",
    ),
    Names(
        _C10D,
        "_get_default_store",
        "Ranks agree on the step at which a preempted run ends, and tensor ranks on batch and generators, without a "
        "collective that would wait for the device.",
        "AttributeError after SIGTERM (the run would end without its checkpoint) and where tensor ranks begin.",
    ),
    Names(
        _C10D,
        "_world",
        "After a group that could not be destroyed torch_npu tries once more at the end, and prints over the reason.",
        "AttributeError while an error is on its way: Python shows both.",
    ),
    Names(
        _C10D,
        "_resolve_process_group",
        "From the name that a functional collective carries to its group.",
        "AttributeError in the testing kit's count of traffic.",
    ),
    Names(
        "torch.distributed.device_mesh.DeviceMesh",
        "_pg_registry",
        "DTensor's caches keep meshes, and these the groups of a closed process group with their threads.",
        "Silent: threads and connections of every trainer call stay until the process ends. Not in every torch.",
    ),
    Names(
        "torch.distributed.tensor",
        "_utils",
        "Where a rank's part of a DTensor lies in the whole, for any placement.",
        "ImportError at export.",
    ),
    Names(
        "torch.distributed.tensor",
        "_redistribute",
        "The name of the logger that repeats one warning per rank and step.",
        "Silent, and harmless: audit and the testing kit print that warning.",
    ),
    Names(
        "torch.distributed.checkpoint.utils",
        "_create_file_view",
        "A file's part as a file: export reads slices of a checkpoint without holding it.",
        "ImportError at export.",
    ),
    Names(
        "torch.distributed.checkpoint.metadata",
        "_MEM_FORMAT_ENCODING",
        "The index of a checkpoint names it; what is not listed is refused.",
        "CheckpointError for every checkpoint that has the new name instead.",
    ),
    Names("torch.distributed.checkpoint.filesystem", "_StorageInfo", "Likewise.", "Likewise."),
    Names("torch.serialization", "_get_layout", "Likewise.", "Likewise."),
    Names(
        "torch.distributed.checkpoint.filesystem.FileSystemReader",
        "_slice_file",
        "Where a shard is cut out of its file: a packed one is refused before torch unpacks it.",
        "Silent: a forged shard could unpack to a thousand times its bytes; tests/unit/checkpoint/test_attacks.py.",
    ),
)
LIGHTNING = (
    Names(
        f"{LOOPS}.training_epoch_loop",
        "_TrainingEpochLoop",
        "Derived from: Lightning forgets what is left of the batch at which a checkpoint was taken.",
        "ImportError.",
    ),
    Names(f"{LOOPS}.fit_loop", "_FitLoop", "Derived from, for the end of the epoch of a checkpoint.", "ImportError."),
    Names(f"{LOOPS}.loop", "_Loop", "Its setter of `restarting`, past that of _FitLoop.", "ImportError."),
    Names(
        f"{LOOPS}.fit_loop._FitLoop",
        "_restarting",
        "_FitLoop's own setter makes it True again where a run is limited by steps.",
        "Silent: a resumed epoch's end would be taken for that of a cut one, and counted twice.",
    ),
    Names(
        f"{LOOPS}.fit_loop._FitLoop",
        "_data_fetcher",
        "Whether a validation follows the batch at which a checkpoint is taken.",
        "AttributeError when a checkpoint is saved.",
    ),
    Names(
        f"{LOOPS}.fit_loop._FitLoop",
        "_load_combined_loader_states",
        "Loader states that Lightning has put by, and forgets where the loaders exist early.",
        "AttributeError at the first epoch.",
    ),
    Names(
        _EPOCH_LOOP,
        "_broadcast_sigterm_tensor",
        "Overridden with nothing: it stalls an accelerator before every batch.",
        "Silent: one host sync and one collective more per batch.",
    ),
    Names(
        _EPOCH_LOOP,
        "_is_validation_done _should_check_val_fx _should_accumulate",
        "Overridden to end the batch of a checkpoint: its validation, and no second step.",
        "Silent: a run resumed in a validation goes on without it, or steps twice.",
    ),
    Names(
        _EPOCH_LOOP,
        "_num_ready_batches_reached",
        "Whether an epoch was cut short by a limit, and is still being trained.",
        "AttributeError when a checkpoint is saved.",
    ),
    Names(
        _EPOCH_LOOP,
        "_batches_that_stepped",
        "The step under which Lightning's own loggers log; it differs from global_step with several optimizers.",
        "AttributeError. Set under another name (ContinueRun does) silently: a resumed curve would start at 0.",
    ),
    Names(
        "lightning.pytorch.trainer.trainer.Trainer",
        "_active_loop",
        "The loop that takes a batch, whose number is to be told; the one whose results lie on a failed run's device.",
        "AttributeError at the first batch, and in teardown, which hides why the run failed.",
    ),
    Names(
        f"{LOOPS}.training_epoch_loop._TrainingEpochLoop",
        "_results",
        "What the loop has logged: taken off a card that failed, before Lightning asks it.",
        "Silent: teardown asks a card that does not answer and the error of the run is replaced by that.",
    ),
    Names(
        "lightning.pytorch.trainer.trainer.Trainer",
        "_logger_connector",
        "Way to the metrics, and to what is about to be logged for a step.",
        "AttributeError at the end of a failed run, and at a save with ContinueRun.",
    ),
    Names(
        _CONNECTOR,
        "_callback_metrics _logged_metrics _progress_bar_metrics",
        "Metrics on a card that failed; those of a checkpoint, which a scheduler looks at after the resume.",
        "AttributeError in teardown and at a resume.",
    ),
    Names(
        "lightning.pytorch.trainer.trainer.Trainer",
        "_detect_anomaly",
        "DTensor learns anomaly detection's operator only for who asks; torch knows of it first inside the fit loop.",
        "AttributeError in setup.",
    ),
    Names(
        "lightning.pytorch.core.module.LightningModule",
        "_trainer",
        "`trainer` raises for a module that has none, which is normal outside of a trainer call.",
        "AttributeError in setup_environment.",
    ),
    Names(
        "lightning.pytorch.core.module.LightningModule",
        "_device_mesh",
        "What `self.device_mesh` returns in a user's configure_model; Lightning's own strategies set it so.",
        "Silent: `self.device_mesh` is None.",
    ),
    Names(
        "lightning.pytorch.core.module.LightningModule",
        "_current_fx_name",
        "Whether a checkpoint is taken before or after the metrics of a validation are known.",
        "AttributeError when a checkpoint is saved in a validation.",
    ),
    Names(
        _SAVER,
        "_defer_save_until_validation _every_n_train_steps _last_global_step_saved",
        "State that ModelCheckpoint does not save: for which step it has saved, or waits for a validation.",
        "AttributeError at a save; set under another name silently: the step of the checkpoint is saved twice.",
    ),
    Names(
        _SAVER,
        "_save_last_checkpoint _should_skip_saving_checkpoint _monitor_candidates _last_checkpoint_saved",
        "Writes last.ckpt at the end of training, under the name and the conditions that Lightning has for it.",
        "AttributeError at the end of training; the last one silently: save_last='link' leads to an earlier step.",
    ),
    Names(
        "lightning.pytorch.callbacks.BaseFinetuning",
        "_restarting",
        "Parameter groups are restored before the optimizers' states, and only in the fit that resumes.",
        "Silent: the next fit's optimizers get the groups of an old checkpoint.",
    ),
    Names(
        f"{LOOPS}.fit_loop._FitLoop",
        "_combined_loader",
        "Whether the loaders of a loop know their lengths.",
        "AttributeError at the first batch.",
    ),
    Names(
        _STRATEGY,
        "_configure_launcher _launcher",
        "The hook where a strategy brings its own launcher.",
        "Silent: Lightning would start no other rank, and the run wait for them.",
    ),
    Names(
        _STRATEGY,
        "_precision_plugin",
        "Set by Lightning's constructor before the devices are known; the setter is overridden.",
        "Silent: mixed precision for cuda on other devices, whose autocast does nothing.",
    ),
    Names(
        "lightning.pytorch.strategies.launchers.subprocess_script",
        "_SubprocessScriptLauncher",
        "Derived from: Lightning treats its launchers by class.",
        "ImportError.",
    ),
    Names(
        "lightning.fabric.utilities.distributed",
        "_set_num_threads_if_needed",
        "Threads per rank, as Lightning's own launcher chooses them.",
        "ImportError.",
    ),
    Names(
        "lightning.fabric.utilities.optimizer",
        "_optimizers_to_device",
        "Moves optimizer state, as Lightning's own strategies do.",
        "ImportError.",
    ),
    Names(
        "lightning.pytorch.overrides.distributed",
        "_IndexBatchSamplerWrapper",
        "Lightning knows by it which samples a prediction is of.",
        "ImportError.",
    ),
    Names(
        "lightning.pytorch.trainer.call",
        "_call_and_handle_interrupt",
        "The frame by which the main thread is known to be inside a trainer call.",
        "Silent: a rank that hangs after an error elsewhere is taken for one that has left the call, and not ended.",
    ),
    Names(
        _TENSORBOARD,
        "_experiment _kwargs",
        "A second writer with `purge_step`, which drops the points after the step of a checkpoint.",
        "AttributeError when a run goes on; ignored arguments would be silent: points logged twice.",
    ),
)
OTHERS = (
    Names(
        "transformers.PreTrainedConfig",
        "_attn_implementation",
        "Names our attention in the model's config, for which transformers then builds no mask; "
        "`set_attn_implementation` takes registered names only.",
        "Silent: transformers builds a mask per forward pass and reads a value on the host for it.",
    ),
    Names(
        "transformers.PreTrainedConfig",
        "_name_or_path",
        "A config's key that says where it came from and is left out when two are compared.",
        "Silent: under another name a model that was moved is refused as another one.",
    ),
    Names(
        "transformers.PreTrainedModel",
        "_can_set_experts_implementation",
        "Which implementations of the experts audit can switch on.",
        "AttributeError in audit --unconverted.",
    ),
    Names(
        "transformers.modeling_layers.GradientCheckpointingLayer",
        "_gradient_checkpointing_func",
        "recompute=block runs a function of ours; transformers' public switch takes torch's checkpoint only.",
        "Silent if the layers asked for another name that has a default: transformers' recompute would run, which "
        "counts picks twice and may route a token otherwise.",
    ),
    Names(
        "omegaconf.DictConfig",
        "_get_root",
        "The composed config remembers the clock that was read for the run's folder; Hydra shows its own part only.",
        "AttributeError when ranks are started.",
    ),
)
# Checked where torch_npu is, in tests/sim.
NPU = (
    Names("torch_npu", "_C", "torch_npu has no public name for the options of hccl groups.", "AttributeError on npu."),
    Names("torch_npu._C", "_distributed_c10d", "Likewise.", "AttributeError on npu."),
    Names(
        f"{_HCCL}.Options",
        "_timeout",
        "The run's time-out, for the groups of a mesh.",
        "Silent if it could still be set: groups of a mesh would wait for torch's default and not the run's.",
    ),
    Names(
        f"{_HCCL}.Options",
        "hccl_config",
        "The size of a group's buffers.",
        "Silent if it could still be set: every group takes the buffers of HCCL_BUFFSIZE.",
    ),
)

# Begin with an underscore and are nobody's secret.
NOT_PRIVATE = {
    "_ZSt13set_terminatePFvvE": "C++'s std::set_terminate, under the name that the ABI gives it",
    "_fields": "Python's documented names of a named tuple's values",
    "_target_": "Hydra's documented key",
    "_convert_": "Hydra's documented key",
    "_scale_inv": "the end of a name in files of quantised weights",
    "_c10d_functional": "a namespace of operators; test_operators_are_there checks what we name of it",
    "_c10d_functional_autograd": "likewise",
    "_npu_dtype_cast": "an operator of torch_npu that the simulator computes; tests/sim runs it",
    "_npu_dtype_cast_backward": "likewise",
    "_npu_moe_token_unpermute": "likewise",
    "_foreach_": "the beginning of the names of torch's for-each functions, whatever they are",
    "_after_torch_npu": "ours, in ascend_sim",
    "_ascend_sim_hook": "ours, in ascend_sim",
    "_lightning_npu_tp": "our mark on a converted model",
    "_lightning_npu_tp_weights": "likewise",
}
PRIVATE = (*TORCH, *DISTRIBUTED, *LIGHTNING, *OTHERS, *NPU)
