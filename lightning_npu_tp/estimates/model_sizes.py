"""The sizes of a decoder by one set of names, whatever its family calls them in its config.

For arithmetic about a model that need not exist: floating-point operations (`flops.py`) and bytes of
activations (`what_fits.py`). Parameters are not counted here; the plan and the meta model know them exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_npu_tp.models.families.family import ModelFamily
from lightning_npu_tp.models.families.registry import family_of


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Widths and numbers of one decoder, of all ranks together.

    key_dim, value_dim:   of one head, as attention multiplies them.
    q_latent, kv_latent:  ranks of the latents of multi-head latent attention; 0 for none.
    rope_dim:             of the key that all heads share there.
    dense_width:          hidden units of an MLP in a layer without experts.
    expert_width:         of one routed expert; shared_width: of all shared experts together.
    shared_gate:          whether the shared experts have a gate of one output.
    head_norms:           whether queries and keys are normalised before they are rotated.
    """

    hidden: int
    vocabulary: int
    layers: int
    sparse_layers: int
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    q_latent: int
    kv_latent: int
    rope_dim: int
    dense_width: int
    experts: int
    picks: int
    expert_width: int
    shared_width: int
    shared_gate: bool
    head_norms: bool = False

    @classmethod
    def of(cls, config: Any, families: Sequence[ModelFamily] = ()) -> ModelSizes:
        """Read the sizes from a transformers config; a family that is not known counts as one without experts.

        families: the user's own. Raises AttributeError for a config that is no decoder's.
        """
        family = family_of(config, families)
        latent = bool(getattr(config, "kv_lora_rank", 0))
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        experts = family.num_experts(config) if family else 0
        expert_width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        shared_width = (getattr(config, "n_shared_experts", None) or 0) * expert_width
        return cls(
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            layers=config.num_hidden_layers,
            sparse_layers=_sparse_layers(config, family),
            heads=heads,
            key_heads=heads if latent else config.num_key_value_heads,
            key_dim=config.qk_nope_head_dim + config.qk_rope_head_dim if latent else head_dim,
            value_dim=config.v_head_dim if latent else head_dim,
            q_latent=(config.q_lora_rank or 0) if latent else 0,
            kv_latent=config.kv_lora_rank if latent else 0,
            rope_dim=config.qk_rope_head_dim if latent else 0,
            dense_width=config.intermediate_size,
            experts=experts,
            picks=config.num_experts_per_tok if experts else 0,
            expert_width=expert_width if experts else 0,
            shared_width=getattr(config, "shared_expert_intermediate_size", 0) or shared_width,
            shared_gate=hasattr(config, "shared_expert_intermediate_size"),
            head_norms=family is not None and family.head_norms,
        )


def _sparse_layers(config: Any, family: ModelFamily | None) -> int:
    if family is None:
        return 0
    try:
        return family.num_sparse_layers(config)
    except AttributeError:
        # Of a family that is not known, read as one with the same setting for experts: it says nothing of dense layers.
        return int(config.num_hidden_layers)
