"""Tiny but true models of every family, random batches, and one process's float64 answer for them.

The configurations have every part of the real models. DeepSeek-V2's: latent attention with rope and nope
parts, a first dense layer, shared and routed experts, YaRN; the grouped one adds the query latent and
group-limited routing. `reference_step` is what each layout is compared with. Needs transformers; nothing
here is sharded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV2Config, PretrainedConfig, PreTrainedModel

from lightning_npu_tp.tools.testing.reference import float64_reference

IGNORED_LABEL = -100

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}

_TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    # Unlike the other two, so that mixing them up cannot go unseen.
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "max_position_embeddings": 1280,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "use_cache": False,
    # Five times the usual: with 0.02 the router is flat and the attention uniform, and mistakes in them are small.
    "initializer_range": 0.1,
}

_GROUPED: dict[str, Any] = {
    "q_lora_rank": 24,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 16.0,
}

_FRAME: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1280,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "use_cache": False,
    "initializer_range": 0.1,
}

# Unlike hidden_size / heads, where a family allows it.
_WIDE_HEADS: dict[str, Any] = {"head_dim": 10}

_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

_OTHERS: dict[str, dict[str, Any]] = {
    "llama": {**_FRAME, **_WIDE_HEADS},
    "qwen2": _FRAME,
    "qwen3": {**_FRAME, **_WIDE_HEADS},
    "mixtral": {**_FRAME, **_WIDE_HEADS, "num_local_experts": 8, "intermediate_size": 16},
    "olmoe": {**_FRAME, "num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16},
    # Of three layers the second and third have experts, of two only the second.
    "qwen2_moe": {
        **_FRAME,
        **_EXPERTS,
        "num_hidden_layers": 3,
        "mlp_only_layers": [0],
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_moe": {**_FRAME, **_EXPERTS, **_WIDE_HEADS, "decoder_sparse_step": 2, "norm_topk_prob": True},
    "deepseek_v3": {
        **_TINY,
        "num_hidden_layers": 2,
        # As many as heads.
        "num_key_value_heads": None,
        "q_lora_rank": 24,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
    },
}
del _OTHERS["deepseek_v3"]["topk_method"]


def tiny_config(family: str, **overrides: Any) -> Any:
    """A transformers config of a supported family, by its name, in small; `overrides` go to the config.

    Raises KeyError for a family without one.
    """
    if family == "deepseek_v2":
        return tiny_deepseek_v2_config(**overrides)
    values = deepcopy(_OTHERS[family])
    if family == "deepseek_v3":
        values["rope_parameters"] = dict(_YARN)
    return AutoConfig.for_model(family, **{**values, **overrides})


def tiny_deepseek_v2_config(**overrides: Any) -> DeepseekV2Config:
    """DeepSeek-V2-Lite in small: 3 layers (1 dense), 8 heads, 8 experts of which 2, greedy routing, YaRN."""
    # A fresh YaRN table each time: the config keeps the dictionary and writes into it.
    return DeepseekV2Config(**{**_TINY, "rope_parameters": dict(_YARN), **overrides})


def tiny_deepseek_v2_grouped_config(**overrides: Any) -> DeepseekV2Config:
    """DeepSeek-V2 in small: V2-Lite's with a query latent, 16 experts of which 4 from 2 of 4 groups, scaled by 16."""
    return tiny_deepseek_v2_config(**{**_GROUPED, **overrides})


def random_batch(
    config: PretrainedConfig, batch: int, length: int, seed: int, *, padding: bool | Literal["left"] = False
) -> dict[str, Tensor]:
    """Random tokens as a causal language model takes them; the model shifts the labels.

    Returns input_ids and labels, int64 [batch, length]. With padding also attention_mask: row i ends
    early (a different length each), or with "left" begins late; the rest is token 0 with label -100.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
    if not padding:
        return {"input_ids": input_ids, "labels": input_ids.clone()}
    ends = length - (torch.arange(batch) + 1) * max(1, length // (batch + 2))
    attention_mask = labelled = (torch.arange(length)[None, :] < ends[:, None]).long()
    if padding == "left":
        attention_mask = attention_mask.flip(1)
        # The first token would be predicted from padding, whose activations are nobody's contract.
        labelled = attention_mask * F.pad(attention_mask, (1, -1))
    return {
        "input_ids": input_ids * attention_mask,
        "labels": torch.where(labelled.bool(), input_ids, IGNORED_LABEL),
        "attention_mask": attention_mask,
    }


def packed_batch(config: PretrainedConfig, batch: int, length: int, seed: int) -> dict[str, Tensor]:
    """Random documents end to end: as `random_batch`, and position_ids, int64 [batch, length], that restart.

    Row i has its second document at another position than its neighbours, and a third of two tokens at the end.
    """
    starts = torch.zeros(batch, length, dtype=torch.int64)
    for row in range(batch):
        second = 1 + (3 * row + length // 3) % (length - 3)
        starts[row, second:] = second
        starts[row, length - 2 :] = length - 2
    return {**random_batch(config, batch, length, seed), "position_ids": torch.arange(length) - starts}


def reference_model(config: PretrainedConfig, seed: int = 0, *, attention: str = "eager") -> PreTrainedModel:
    """The causal language model that transformers itself computes, in float64, with random weights.

    attention: "eager" or "sdpa". The experts run eagerly, the only implementation that takes float64.
    Norm weights are random around 1 and biases around 0, so that a forgotten or swapped one shows; those of
    a router's choice are the same for every seed. Run it inside `float64_reference()`.
    """
    with float64_reference(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            deepcopy(config), attn_implementation=attention, experts_implementation="eager"
        )
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
            elif name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.linspace(-0.2, 0.2, len(buffer)))
    return model


@dataclass(frozen=True)
class ReferenceStep:
    """One process's answer, in float64.

    loss:       of the first step: sum over the tokens that count, of all micro-batches, over their number.
    logits:     of the first step, one [batch, length, vocabulary] per micro-batch.
    gradients:  of the first step, before clipping, by parameter name.
    grad_norm:  their 2-norm.
    losses:     of every step.
    parameters: after the last step, by name.
    """

    loss: Tensor
    logits: list[Tensor]
    gradients: dict[str, Tensor]
    grad_norm: Tensor
    losses: list[Tensor]
    parameters: dict[str, Tensor]


def reference_step(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    steps: int = 3,
    learning_rate: float = 1e-2,
    weight_decay: float = 0.1,
    clip_norm: float | None = None,
) -> ReferenceStep:
    """Train a copy of `model` for `steps` AdamW steps on the same accumulated `batches`.

    model:     from `reference_model`; stays as it is.
    batches:   micro-batches of one optimizer step, each as `random_batch` makes them.
    clip_norm: clip the gradients to this 2-norm before each step; None does not clip.
    """
    model = deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    tokens = sum(counted_tokens(batch) for batch in batches)
    losses: list[Tensor] = []
    with float64_reference():
        for step in range(steps):
            outputs = [model(**batch, num_items_in_batch=tokens) for batch in batches]
            loss = torch.stack([output.loss for output in outputs]).sum()
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.detach())
            if step == 0:
                logits = [output.logits.detach() for output in outputs]
                gradients = {name: _gradient(parameter).clone() for name, parameter in model.named_parameters()}
                grad_norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
    return ReferenceStep(
        loss=losses[0],
        logits=logits,
        gradients=gradients,
        grad_norm=grad_norm,
        losses=losses,
        parameters={name: parameter.detach() for name, parameter in model.named_parameters()},
    )


@dataclass(frozen=True)
class BatchAnswer:
    """What one batch gives at the initial weights.

    loss:      scalar: sum over the tokens that count over their number, balance losses added where asked for.
    logits:    [batch, length, vocabulary], or a data rank's rows of them.
    gradients: of the loss, whole, by parameter name.
    paths:     that a rank took: attention "causal" (no mask) or "masked", "sliced" sequences, "recomputed" layers;
               empty for one process, and where the layers are none of ours.
    """

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]
    paths: frozenset[str] = frozenset()


def counted_tokens(batch: Mapping[str, Tensor]) -> int:
    """Labels of a batch that count in its loss; the model shifts them by one."""
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())


def reference_answer(
    model: PreTrainedModel, batch: Mapping[str, Tensor], side_losses: Sequence[Tensor] = ()
) -> BatchAnswer:
    """One process's answer for one batch, in float64.

    model:       from `reference_model`; its gradients are none afterwards.
    side_losses: a list that hooks on the model fill in its forward; added to the loss.
    """
    with float64_reference():
        output = model(**batch, num_items_in_batch=counted_tokens(batch))
        loss = output.loss + sum(side_losses)
        loss.backward()
    gradients = {name: _gradient(parameter).clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return BatchAnswer(loss.detach(), output.logits.detach(), gradients)


def _gradient(parameter: Tensor) -> Tensor:
    """The parameter's gradient; zero where no token reached it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
