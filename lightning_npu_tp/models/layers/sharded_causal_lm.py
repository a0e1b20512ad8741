"""Forwards of a converted causal LM, its decoder and the decoder's layers, in the place of transformers' own.

Conversion makes a model an instance of a subclass of its transformers class, so that `generate`,
`save_pretrained` and isinstance checks go on working. The causal LM computes the loss on sharded logits; the decoder
builds its attention mask without asking a tensor anything on the host (transformers reads one value per forward);
and all three hand the ForwardPass on, to every module that needs to know of slices, masks and balance losses.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs
from typing_extensions import override

from lightning_npu_tp.errors import ConfigError, ConversionError
from lightning_npu_tp.models.layers.vocab import IGNORED_LABEL
from lightning_npu_tp.parallel.forward_pass import ForwardPass, handed
from lightning_npu_tp.parallel.layout import Groups
from lightning_npu_tp.parallel.tensor_region import Region
from lightning_npu_tp.parallel.whole_values import paused

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


class ShardedDecoderLayer(nn.Module):
    """Mixin for a decoder layer of two halves, attention and MLP, each with a norm before and a residual around it.

    Parts get the ForwardPass by keyword: a user's forward pre-hook that returns another input leaves keywords alone.
    """

    input_layernorm: Any
    self_attn: Any
    post_attention_layernorm: Any
    mlp: Any

    @override
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        step: ForwardPass | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states: [B, S or slice, D]; returns the same shape. What else comes in goes to the attention."""
        if step is not None:
            step.layers.append(self)
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states, step=step)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states, attention_mask=attention_mask, step=step, **kwargs
        )
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states, step=step)
        hidden_states = self.mlp(hidden_states, step=step)
        return residual + hidden_states


class ShardedDecoder(nn.Module):
    """Mixin for a transformers decoder (`embed_tokens`, `layers`, `norm`, `rotary_emb`)."""

    config: Any
    layers: Any
    embed_tokens: Any
    norm: Any
    rotary_emb: Any
    # Set by conversion; a decoder that was only mixed with this class works whole.
    region: Region = Region(Groups())

    @capture_outputs
    @paused()
    @override
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        token_mask: Tensor | None = None,
        step: ForwardPass | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """As transformers' forward; all tensors global and replicated over the tensor ranks.

        token_mask: as in `ShardedCausalLM`; of a decoder that is called by itself.
        step: of the model around the decoder. With a sliced region, last_hidden_state is this rank's slice.
        Raises ConversionError where layers of another kind lose what they would need of it.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        is_own_pass = step is None
        step = step or ForwardPass(self.region, token_mask=_token_mask(token_mask, attention_mask, tokens))
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", False)) and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        mask = attention_mask_4d(
            attention_mask,
            position_ids,
            query_length=tokens.shape[1],
            past_length=past_length,
            device=tokens.device,
        )
        if position_ids is None:
            position_ids = past_length + torch.arange(tokens.shape[1], device=tokens.device)[None]
        hidden = self.embed_tokens(input_ids, step=step) if inputs_embeds is None else step.region.slice(inputs_embeds)
        tables = self.rotary_emb(hidden, position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=tables,
                **handed(step, layer),
                **kwargs,
            )
        _refuse_lost_pass(self, step)
        if is_own_pass and step.balance_losses:
            warnings.warn(
                f"The balance losses of {type(self).__name__} are lost: it was called without the ForwardPass of its "
                f"causal LM. Call the causal LM, whose output has aux_loss, or pass step=ForwardPass(...).",
                stacklevel=2,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden, step=step), past_key_values=past_key_values)


class ShardedCausalLM(nn.Module):
    """Mixin for a transformers causal LM (`model`, `lm_head`)."""

    model: Any
    lm_head: Any

    @can_return_tuple
    @paused()
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
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As transformers' forward, on one rank's part of the model.

        input_ids, labels: [B, S]; labels are not shifted, -100 is ignored (`shift_labels`: shifted).
        num_items_in_batch: divisor of the summed loss; None takes the number of labels that count.
        gather_logits: whether to return logits [B, S, V]; None means only when no labels are given,
        since training needs no logits and they are the largest tensor of the model.
        token_mask: bool [B, S], false for padding, which then counts in no balance loss and no expert's picks; None
        takes attention_mask [B, S], or counts all. For batches without one: packed documents, a 4-D mask.

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
        if tokens is not None:
            has_cache = past_key_values is not None or bool(use_cache)
            region = region.sliced(region.length_to_slice(tokens.shape[1], has_cache=has_cache))
        step = ForwardPass(region, token_mask=_token_mask(token_mask, attention_mask, tokens))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **handed(step, self.model),
            **kwargs,
        )
        _refuse_lost_pass(self.model, step)
        hidden = region.enter(outputs.last_hidden_state)
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
        losses = list(step.balance_losses)
        # What keeps the pass, such as a checkpoint of the user's own, must not keep the graph of its losses.
        step.balance_losses.clear()
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=sum(losses[1:], losses[0]) if losses else None,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _refuse_lost_pass(decoder: Any, step: ForwardPass) -> None:
    """Raise ConversionError if a layer that ran without the pass has parts that need it."""
    layers = decoder.layers[: decoder.config.num_hidden_layers]
    if len(step.layers) >= len(layers):
        return
    for index, layer in enumerate(layers):
        has_experts = any(hasattr(module, "pending_tokens_per_expert") for module in layer.modules())
        if not any(layer is seen for seen in step.layers) and (step.region.is_sliced or has_experts):
            raise ConversionError(
                f"Layer {index}, a {type(layer).__name__}, ran without the ForwardPass: slices, balance losses and "
                f"what recompute remembers would be lost. Let the forward of a layer of your own call "
                f"super().forward(hidden_states, **kwargs), let that of a decoder hand its keyword `step` to each "
                f"layer, or give the family lightning_npu_tp.models.ShardedDecoderLayer for model.layers."
            )


def _token_mask(token_mask: Tensor | None, attention_mask: Tensor | None, tokens: Tensor | None) -> Tensor | None:
    """Which tokens are none of padding, bool [B, S], as the user says; None where nobody says it.

    attention_mask: [B, L] over cached positions as well; a ready-made 4-D one says nothing of tokens.
    tokens: [B, S, …]. Raises ConfigError for a token_mask of another shape.
    """
    if tokens is None:
        return None
    if token_mask is None:
        if attention_mask is None or attention_mask.ndim != 2:
            return None
        token_mask = attention_mask[:, -tokens.shape[1] :]
    elif token_mask.shape != tokens.shape[:2]:
        raise ConfigError(
            f"token_mask has the shape {tuple(token_mask.shape)}, but there are {tuple(tokens.shape[:2])} tokens. Give "
            f"one value for each token, false for padding."
        )
    return token_mask.to(device=tokens.device, dtype=torch.bool)


_SUBCLASSES: dict[tuple[type, type], type] = {}


def mix_in(module: nn.Module, mixin: type, *, keep_foreign: bool = False) -> None:
    """Make `module` an instance of its class with `mixin` in it, keeping its state; twice is once.

    module: of a list, each of its children becomes one. The mixin's forward takes the place of transformers'; that of
            a user's own subclass still runs, and finds the mixin's where it calls its parent's.
    keep_foreign: leave alone a module with no class of transformers' among its parents. It is a user's, in a model of
            transformers', and its forward calls the sharded parts by itself.
    """
    if isinstance(module, nn.ModuleList):
        for child in module:
            mix_in(child, mixin, keep_foreign=keep_foreign)
    elif not isinstance(module, mixin) and (not keep_foreign or _is_of_transformers(type(module))):
        key = (mixin, type(module))
        if key not in _SUBCLASSES:
            _SUBCLASSES[key] = _subclass(type(module), mixin)
        module.__class__ = _SUBCLASSES[key]


def _is_of_transformers(kind: type) -> bool:
    return any(parent.__module__.startswith("transformers.") for parent in kind.__mro__)


def _subclass(kind: type, mixin: type) -> type:
    base = next((parent for parent in kind.__mro__ if parent.__module__.startswith("transformers.")), kind)
    sharded = type(f"Sharded{base.__name__}", (mixin, base), {})
    return sharded if kind is base else type(f"Sharded{kind.__name__}", (kind, sharded), {})


def check_parts(module: nn.Module, mixin: type, *, keep_foreign: bool = False) -> None:
    """Raise ConversionError for a decoder layer whose parts are others than the mixin computes with.

    A subclass of the user's own may have more; what they do is said in its forward. keep_foreign: see `mix_in`.
    """
    if isinstance(module, nn.ModuleList):
        for child in module:
            check_parts(child, mixin, keep_foreign=keep_foreign)
    elif keep_foreign and not _is_of_transformers(type(module)):
        return
    elif issubclass(mixin, ShardedDecoderLayer) and not isinstance(module, mixin):
        parts, known = {name for name, _ in module.named_children()}, set(ShardedDecoderLayer.__annotations__)
        is_transformers_own = type(module).__module__.startswith("transformers.")
        if parts != known if is_transformers_own else not known <= parts:
            raise ConversionError(
                f"{type(module).__name__} has the parts {sorted(parts)}, and ShardedDecoderLayer computes with "
                f"{sorted(known)}. Give the family a mixin of its own for model.layers."
            )
