"""Public names of other libraries that our code reads with a default, compares with or looks for.

Whoever reads them so does not notice that they are gone; test_upstream.py does.
"""

from __future__ import annotations

from upstream_names import FSDP, LOOPS, Names

_DEEPSEEK_V3 = "transformers.models.deepseek_v3.modeling_deepseek_v3"
READ_WITH_DEFAULT = (
    *(
        Names(
            f"transformers.{family}Config",
            "initializer_range",
            "The width of initial weights.",
            "Silent: 0.02 for every model.",
        )
        for family in (
            "DeepseekV2",
            "DeepseekV3",
            "Llama",
            "Mixtral",
            "Olmoe",
            "Qwen2",
            "Qwen2Moe",
            "Qwen3",
            "Qwen3Moe",
        )
    ),
    *(
        Names(
            f"transformers.{family}Config",
            "sliding_window",
            "Sliding windows are refused.",
            "Silent: trained with full attention.",
        )
        for family in ("Mixtral", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe")
    ),
    *(
        Names(
            f"transformers.{family}Config",
            "output_router_logits",
            "Asks for transformers' balance loss.",
            "Silent: trained without the balance loss that was asked for.",
        )
        for family in ("Mixtral", "Olmoe", "Qwen2Moe", "Qwen3Moe")
    ),
    Names(
        "transformers.DeepseekV3Config",
        "rope_interleave",
        "How rotary pairs lie in memory.",
        "Silent: a model whose config says False is rotated in interleaved pairs.",
    ),
    Names(
        f"{_DEEPSEEK_V3}.DeepseekV3TopkRouter",
        "e_score_correction_bias",
        "The bias by which a router balances without a loss.",
        "Silent: a router without bias, another model.",
    ),
    Names(
        "transformers.modeling_layers.GradientCheckpointingLayer",
        "gradient_checkpointing",
        "The switch of recompute=block.",
        "ConfigError with recompute=block; silent if only some layers still have it.",
    ),
    Names(
        "lightning.pytorch.plugins.precision.amp.MixedPrecision",
        "scaler",
        "Whether an overflow is the scaler's business.",
        "Silent: the guard of non-finite gradients ends runs in which 16-mixed only looks for its scale.",
    ),
    Names(
        "lightning.pytorch.trainer.trainer.Trainer._run_stage",
        "run-stage",
        "The barrier after which Lightning's signal handlers are taken over.",
        "Silent: SIGTERM to one rank leaves the others waiting, and no checkpoint is saved.",
    ),
    Names(
        f"{LOOPS}.fit_loop._FitLoop.on_save_checkpoint",
        "combined_loader",
        "The key under which Lightning saves the positions of data loaders.",
        "Silent: every rank goes on at rank 0's position in the data.",
    ),
    Names(
        f"{FSDP}._fsdp_common.FSDPMeshInfo.__post_init__",
        "shard_process_group",
        "FSDP keeps groups that are about to be destroyed.",
        "Silent: their threads and connections stay until the process ends.",
    ),
    Names(f"{FSDP}._fsdp_common.DDPMeshInfo.__post_init__", "replicate_process_group", "Likewise.", "Likewise."),
    Names(
        "torch.distributed.fsdp.FSDPModule",
        "reset_iter_state",
        "After a failed forward pass parameters are slices again. Not before torch 2.13.",
        "Silent: after an out-of-memory error the module goes back to the host with whole parameters as its slices.",
    ),
    Names(
        "torch.distributed.ProcessGroupGloo",
        "options",
        "The time-out that the warm-up lengthens and restores.",
        "Silent: the warm-up's time-out is the run's.",
    ),
)
