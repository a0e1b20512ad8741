"""Forward passes of a converted decoder and its causal-LM head, as subclasses of transformers' own.

Conversion makes a model an instance of a subclass of its transformers class, so that `generate`,
`save_pretrained` and isinstance checks go on working. Two forwards change: the decoder builds its
attention mask without asking a tensor anything on the host (transformers reads one value per
forward), and the causal LM computes the loss on sharded logits. The layers in between are untouched.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import can_return_tuple
from typing_extensions import override

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.models.layers.vocab import IGNORED_LABEL
from lightning_npu_tp.parallel.layout import Groups
from lightning_npu_tp.parallel.tensor_region import Region

# transformers builds no mask for an implementation that it has no mask function for: ours come in
# ready made (bool [B, 1, S, L]) or are None, which means causal.
ATTENTION_NAME = "lightning_npu_tp"


def attention_mask_4d(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    query_length: int,
    past_length: int,
    device: torch.device,
) -> Tensor | None:
    """The mask that transformers would build, decided from what was passed and not from its values.

    attention_mask: [B, L] of 0 and 1, or 4-D ready made. position_ids: [B, S] or [1, S]; where they
    do not go up by one a new document starts, which sees nothing of the one before.
    Returns bool [B, 1, S, L], True = attend, or None for plain causal attention.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    packed = None if attention_mask is not None or past_length else position_ids
    if attention_mask is None and packed is None and (past_length == 0 or query_length == 1):
        return None
    keys = torch.arange(past_length + query_length, device=device)
    queries = keys[past_length:]
    mask = (keys[None, :] <= queries[:, None])[None, None]
    if attention_mask is not None:
        # A padded query row would see nothing at all, and its softmax would be 0/0; it may see itself.
        itself = keys[None, :] == queries[:, None]
        mask = (mask & attention_mask.to(device=device, dtype=torch.bool)[:, None, None, :]) | itself
    if packed is not None:
        restarts = torch.diff(packed, prepend=packed[:, :1] - 1, dim=-1) != 1
        document = restarts.cumsum(-1)
        mask = mask & (document[:, None, :, None] == document[:, None, None, :])
    return mask


class ShardedDecoder(nn.Module):
    """Mixin for a transformers decoder (`embed_tokens`, `layers`, `norm`, `rotary_emb`)."""

    layers: Any
    embed_tokens: Any
    # Set by conversion; a decoder that was only mixed with this class works whole.
    region: Region = Region(Groups())

    @override
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' forward; all tensors global and replicated over the tensor ranks.

        Within `region.sequence(…)`, last_hidden_state is this rank's slice of the sequence.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        if use_cache is None and self.training:
            use_cache = False
        mask = None
        if tokens is not None:
            past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
            mask = attention_mask_4d(
                attention_mask,
                position_ids,
                query_length=tokens.shape[1],
                past_length=past_length,
                device=tokens.device,
            )
            counted = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
            for block in moe_blocks(self):
                block.token_mask = counted
            if self.region.is_sliced:
                if position_ids is None:
                    # transformers would count the positions of the slice.
                    position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None]
                embeds = self.embed_tokens(input_ids) if inputs_embeds is None else self.region.slice(inputs_embeds)
                input_ids, inputs_embeds = None, embeds
        return super().forward(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class ShardedCausalLM(nn.Module):
    """Mixin for a transformers causal LM (`model`, `lm_head`)."""

    model: Any
    lm_head: Any

    @can_return_tuple
    @override
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        gather_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As transformers' forward, on one rank's part of the model.

        input_ids, labels: [B, S]; labels are not shifted, -100 is ignored (`shift_labels`: shifted).
        num_items_in_batch: divisor of the summed loss; None takes the number of labels that count.
        gather_logits: whether to return logits [B, S, V]; None means only when no labels are given,
        since training needs no logits and they are the largest tensor of the model.

        Returns loss (scalar, at least float32, replicated), logits, aux_loss: the sum of the
        balance losses of the MoE layers, not part of `loss`.
        """
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED_LABEL)
        has_labels = shift_labels is not None
        if use_cache is None and has_labels:
            use_cache = False
        region: Region = self.model.region
        tokens = input_ids if input_ids is not None else inputs_embeds
        sliced = None
        if tokens is not None:
            sliced = region.length_to_slice(tokens.shape[1], has_cache=past_key_values is not None or bool(use_cache))
        with region.sequence(sliced):
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
            hidden = region.enter(outputs.last_hidden_state, of=self.lm_head)
        loss = None
        if shift_labels is not None:
            flat = shift_labels.reshape(-1)
            total = self.lm_head.token_losses(hidden.flatten(0, -2), flat).sum()
            count = (flat != IGNORED_LABEL).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = total / count
        logits = None
        if gather_logits or (gather_logits is None and not has_labels):
            # slice(-0, None) is everything, which is what 0 means to transformers.
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head.logits(hidden[:, keep])
        blocks = [block for block in moe_blocks(self.model) if block.aux_loss is not None]
        aux_losses = [block.aux_loss for block in blocks]
        if torch.is_grad_enabled() and any(b.gate.weight.requires_grad > b.aux_loss.requires_grad for b in blocks):
            raise ConfigError(
                "The router's balance losses have no gradient: the layers ran under reentrant activation "
                "checkpointing, which loses it. Set strategy.recompute=block instead of transformers' own switch, or "
                "pass use_reentrant=False to that."
            )
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=sum(aux_losses[1:], aux_losses[0]) if aux_losses else None,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def moe_blocks(decoder: Any) -> list[Any]:
    """The converted mixture-of-experts blocks of a decoder, in layer order."""
    return [layer.mlp for layer in decoder.layers if hasattr(layer.mlp, "aux_loss")]


_SUBCLASSES: dict[tuple[type, type], type] = {}


def become(module: nn.Module, mixin: type) -> None:
    """Make `module` an instance of (mixin, its class), keeping its state; twice is once."""
    if isinstance(module, mixin):
        return
    key = (mixin, type(module))
    if key not in _SUBCLASSES:
        _SUBCLASSES[key] = type(f"Sharded{type(module).__name__}", (mixin, type(module)), {})
    module.__class__ = _SUBCLASSES[key]
