"""Forwards of a converted causal LM, its decoder and the decoder's layers, in the place of transformers' own.

Conversion makes a model an instance of a subclass of its transformers class, so that `generate` and isinstance
checks go on working (`save_pretrained`: whole_weights.py). The causal LM computes the loss on sharded logits; the
decoder builds its attention mask without asking a tensor anything on the host (transformers reads one value per
forward); and all three hand the ForwardPass on, to every module that needs to know of slices, masks and balance losses.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from typing_extensions import override

from lightning_npu_tp.errors import ConfigError, ConversionError
from lightning_npu_tp.models.layers.forward_arguments import (
    choose_states,
    has_hooks,
    keep_positions,
    own_forwards,
    read_by,
    refuse_unread,
    take_shown,
)
from lightning_npu_tp.models.layers.vocab import IGNORED_LABEL
from lightning_npu_tp.models.layers.whole_weights import WholeWeights
from lightning_npu_tp.models.moe.balance import layers_balance_loss
from lightning_npu_tp.parallel.forward_pass import ForwardPass, handed
from lightning_npu_tp.parallel.layout import Groups
from lightning_npu_tp.parallel.recompute import checkpointed
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
    if isinstance(attention_mask, dict):
        raise ConfigError(
            f"attention_mask is a dictionary of {sorted(attention_mask)}, which is not supported. Pass the mask of "
            f"full attention itself: every layer here attends to all earlier positions."
        )
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
    # Set by conversion. No annotations: those are the layer's parts (`mixins.check_parts`).
    region = Region(Groups())
    has_dropout = True

    @property
    def _gradient_checkpointing_func(self) -> Any:
        """How the layer runs while transformers' switch is on: as with recompute=block, whatever function it set."""
        return partial(checkpointed, self.region, self.has_dropout)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Any) -> None:
        pass

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
        return_dict: bool | None = None,
        step: ForwardPass | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' forward; all tensors global and replicated over the tensor ranks.

        token_mask: as in `ShardedCausalLM`; of a decoder that is called by itself.
        step:   of the model around the decoder. With a sliced region, last_hidden_state is this rank's slice.
        kwargs: output_hidden_states, output_attentions and output_router_logits, where no step says what to show, and
                what layers of a user's own take.
        Returns a MoeModelOutputWithPast, or a tuple of what is not None.
        Raises ConversionError where layers of another kind lose what they would need of it.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        is_own_pass = step is None
        shown = take_shown(self.config, kwargs)
        kwargs = refuse_unread(self, kwargs, own_forwards(self.layers), position_ids=position_ids)
        step = step or ForwardPass(self.region, token_mask=_token_mask(token_mask, attention_mask, tokens), show=shown)
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
            step.show("hidden_states", hidden)
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
        hidden = self.norm(hidden, step=step)
        step.show("hidden_states", hidden)
        output = MoeModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            **(_shown(step, shown) if is_own_pass else {}),
        )
        return output if _returns_dict(self.config, return_dict) else output.to_tuple()


class ShardedCausalLM(WholeWeights):
    """Mixin for a transformers causal LM (`model`, `lm_head`)."""

    config: Any
    model: Any
    lm_head: Any

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
        *,
        logits_to_keep: int | Tensor = 0,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int = IGNORED_LABEL,
        gather_logits: bool | None = None,
        token_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' forward, on one rank's part of the model.

        input_ids, labels: [B, S]; labels are not shifted, ignore_index is ignored (`shift_labels`: shifted).
        num_items_in_batch: divisor of the summed loss; None takes the number of labels that count.
        logits_to_keep: positions that logits, and the loss, are computed for; see `keep_positions`.
        gather_logits: whether to return logits [B, S, V]; None means only when no labels are given or a tuple is
            asked for, since training needs no logits and they are the largest tensor of the model.
        token_mask: bool [B, S], false for padding, which then counts in no balance loss and no expert's picks; None
            takes attention_mask [B, S], or counts all. For batches without one: packed documents, a 4-D mask.
        kwargs: output_hidden_states, output_attentions, output_router_logits; what a `loss_function` of the user's
            takes, or layers of the user's own.

        A `loss_function` of the user's and hooks of `lm_head` get gathered logits.

        Returns a MoeCausalLMOutputWithPast, or a tuple of what is not None: loss (scalar, at least float32,
        replicated), logits, aux_loss: the sum of the balance losses of the MoE layers, not part of `loss`; with
        output_router_logits in families whose transformers class has a `router_aux_loss_coef`: transformers' own
        balance loss over all layers, which times that factor is part of `loss`, as there.
        Raises ConfigError for an argument that nothing reads and for two balance losses at once.
        """
        shown = take_shown(self.config, kwargs)
        has_labels = labels is not None or shift_labels is not None
        loss_function: Any = getattr(self, "loss_function", ForCausalLMLoss)
        has_own_loss = has_labels and loss_function is not ForCausalLMLoss
        decoders = own_forwards([self.model, *self.model.layers])
        readers = [*decoders, loss_function] if has_own_loss else decoders
        kwargs = refuse_unread(self, kwargs, readers, position_ids=position_ids)
        if use_cache is None and has_labels:
            use_cache = False
        region: Region = self.model.region
        head_has_hooks = has_hooks(self.lm_head)
        tokens = input_ids if input_ids is not None else inputs_embeds
        # What is shown, to the caller or to hooks, is shown whole.
        if tokens is not None and not shown and not head_has_hooks:
            has_cache = past_key_values is not None or bool(use_cache)
            region = region.sliced(region.length_to_slice(tokens.shape[1], has_cache=has_cache))
        step = ForwardPass(region, token_mask=_token_mask(token_mask, attention_mask, tokens), show=shown)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **handed(step, self.model),
            **read_by(decoders, kwargs, readers),
        )
        _refuse_lost_pass(self.model, step)
        hidden = outputs.last_hidden_state
        entered = keep_positions(region.enter(hidden), logits_to_keep)
        logits = loss = None
        if gather_logits is None:
            gather_logits = not has_labels or not _returns_dict(self.config, return_dict)
        if gather_logits or (has_labels and (has_own_loss or head_has_hooks)):
            logits = (
                self.lm_head(keep_positions(hidden, logits_to_keep)) if head_has_hooks else self.lm_head.logits(entered)
            )
        if has_own_loss:
            given = {"shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            given = {name: value for name, value in given.items() if value is not None} | kwargs
            if ignore_index != IGNORED_LABEL:
                given["ignore_index"] = ignore_index
            # By position where transformers does so: the function's names are its author's.
            named = {"logits": logits, "labels": labels, "vocab_size": self.config.vocab_size}
            by_position = hasattr(self, "router_aux_loss_coef")
            loss = loss_function(*named.values(), **given) if by_position else loss_function(**named, **given)
        elif has_labels:
            if shift_labels is None:
                assert labels is not None
                shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
            whole = logits if head_has_hooks else None
            loss = self._cross_entropy(entered, whole, shift_labels, ignore_index, num_items_in_batch)
        seen = _shown(step, shown)
        loss, aux_loss = self._with_balance_loss(loss, step)
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            **seen,
        )
        return output if _returns_dict(self.config, return_dict) else output.to_tuple()

    def _cross_entropy(
        self,
        entered: Tensor,
        logits: Tensor | None,
        shift_labels: Tensor,
        ignore_index: int,
        num_items_in_batch: int | Tensor | None,
    ) -> Tensor:
        """Sum over the tokens that count over their number; of whole logits where there are, else of the shards'.

        entered: [B, P, D] or [N, D], the positions kept. shift_labels: as many ids.
        """
        labels, rows = shift_labels.reshape(-1), entered.flatten(0, -2)
        if len(labels) != len(rows):
            raise ConfigError(
                f"logits_to_keep leaves {len(rows)} positions and there are {len(labels)} labels. Leave logits_to_keep "
                f"out of a call with labels, or pass shift_labels for the positions that it keeps."
            )
        if logits is None:
            losses = self.lm_head.token_losses(rows, labels, ignore_index)
        else:
            wide = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
            losses = F.cross_entropy(wide, labels, ignore_index=ignore_index, reduction="none")
        count = (labels != ignore_index).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / count

    def _with_balance_loss(self, loss: Tensor | None, step: ForwardPass) -> tuple[Tensor | None, Tensor | None]:
        """The loss, and the aux_loss of the output; what the pass holds of graphs is let go."""
        losses, logits = list(step.balance_losses), step.shown.get("router_logits")
        aux_loss = sum(losses[1:], losses[0]) if losses else None
        factor = getattr(self, "router_aux_loss_coef", None)
        if logits and factor is not None:
            if losses:
                own = {name: getattr(self.config, name, 0.0) for name in ("aux_loss_alpha", "router_z_loss_coef")}
                raise ConfigError(
                    f"output_router_logits=True adds transformers' balance loss to the loss, and the config asks for "
                    f"{' and '.join(f'{name}={value}' for name, value in own.items() if value)}, which are returned "
                    f"beside it. Set either these to 0 or output_router_logits to false."
                )
            aux_loss = layers_balance_loss(logits, self.config.num_experts_per_tok, step.token_mask)
            loss = None if loss is None else loss + factor * aux_loss
        # What keeps the pass, such as a checkpoint of the user's own, must not keep the graph of its losses.
        step.balance_losses.clear()
        step.shown.clear()
        return loss, aux_loss


def _returns_dict(config: Any, return_dict: bool | None) -> bool:
    return bool(getattr(config, "return_dict", True) if return_dict is None else return_dict)


def _shown(step: ForwardPass, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the pass has been asked to show, as fields of transformers' outputs.

    asked: as `take_shown` returns it. Raises ConversionError for hidden states that a decoder of another kind keeps.
    """
    seen: dict[str, Any] = {name: tuple(tensors) for name, tensors in step.shown.items() if tensors}
    if "hidden_states" in asked:
        if "hidden_states" not in seen:
            raise ConversionError(
                "output_hidden_states=True: the decoder's own forward does not show them. Let it call step.show("
                "'hidden_states', hidden) with each layer's input and with the result of its last norm."
            )
        seen["hidden_states"] = choose_states(seen["hidden_states"], asked["hidden_states"])
    return seen


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


def _token_mask(token_mask: Tensor | None, attention_mask: Any, tokens: Tensor | None) -> Tensor | None:
    """Which tokens are none of padding, bool [B, S], as the user says; None where nobody says it.

    attention_mask: [B, L] over cached positions as well; a ready-made 4-D one says nothing of tokens.
    tokens: [B, S, …]. Raises ConfigError for a token_mask of another shape.
    """
    if tokens is None:
        return None
    if token_mask is None:
        if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
            return None
        token_mask = attention_mask[:, -tokens.shape[1] :]
    elif token_mask.shape != tokens.shape[:2]:
        raise ConfigError(
            f"token_mask has the shape {tuple(token_mask.shape)}, but there are {tuple(tokens.shape[:2])} tokens. Give "
            f"one value for each token, false for padding."
        )
    return token_mask.to(device=tokens.device, dtype=torch.bool)
