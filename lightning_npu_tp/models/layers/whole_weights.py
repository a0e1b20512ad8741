"""transformers' own ways to write and to change a model's weights, on a sharded one: gathered, changed, cut again.

Both gather one parameter after another on every rank and are collective: all ranks call them. For models that no
host holds whole there is lightning-npu-tp export.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.tensor import DTensor, distribute_tensor
from typing_extensions import override

from lightning_npu_tp.errors import ConfigError, ConversionError

# How long the first rank waits for the others in a call that all must make.
_SECONDS = 60.0
_calls: Counter[str] = Counter()


class WholeWeights(nn.Module):
    """Mixin for a transformers model: `save_pretrained` and `resize_token_embeddings` of one that is sharded."""

    config: Any
    model: Any
    lm_head: Any

    @override
    def save_pretrained(  # type: ignore[misc]
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As transformers' save_pretrained, in the same names; every rank calls it and rank 0 writes.

        Rank 0 holds the whole model in host memory meanwhile.
        Raises ConfigError where some ranks do not call it.
        """
        require_all_ranks("save_pretrained")
        if state_dict is None:
            state_dict = whole_state(self)
        if is_main_process and _rank() == 0:
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)  # type: ignore[misc]
            if (Path(save_directory) / "config.json").exists():
                # transformers has written the name of the sharded class.
                self.config.architectures = [transformers_class(type(self)).__name__]
                self.config.save_pretrained(save_directory)
        if dist.is_initialized():
            # Who reads it next may be any rank.
            dist.barrier()

    @override
    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
        """As transformers' resize_token_embeddings; every rank calls it, new rows are rank 0's.

        As there, optimizers that exist keep the old parameters. Returns the input embeddings.
        Raises ConversionError for a model that is shared over data ranks.
        """
        embedding, head = self.model.embed_tokens, self.lm_head
        if new_num_tokens is None and not args and not kwargs:
            return embedding
        if not isinstance(embedding.weight, DTensor) or embedding.weight.device_mesh.ndim > 1 or _is_in_fsdp(self):
            raise ConversionError(
                f"resize_token_embeddings({new_num_tokens}) after conversion: FSDP has shared the embeddings over data "
                f"ranks. Call it before the model is sharded, in __init__ or configure_model."
            )
        require_all_ranks("resize_token_embeddings")
        mesh, placements = embedding.weight.device_mesh, embedding.weight.placements
        is_tied = head.weight is embedding.weight
        plain_embedding = nn.Embedding.from_pretrained(_whole(embedding.weight), padding_idx=embedding.padding_idx)
        plain_head = nn.Linear(head.weight.shape[1], head.weight.shape[0], bias=False, device="meta")
        plain_head.weight = plain_embedding.weight if is_tied else nn.Parameter(_whole(head.weight))
        for plain, sharded in ((plain_embedding, embedding), (plain_head, head)):
            plain.weight.requires_grad_(sharded.weight.requires_grad)
        self.model.embed_tokens, self.lm_head = plain_embedding, plain_head
        try:
            super().resize_token_embeddings(new_num_tokens, *args, **kwargs)  # type: ignore[misc]
            resized = (self.model.embed_tokens.weight, self.lm_head.weight)
        finally:
            self.model.embed_tokens, self.lm_head = embedding, head
        for module, weight in zip((embedding, head), resized, strict=True):
            if is_tied and module is head:
                head.weight = embedding.weight
                continue
            # distribute_tensor takes rank 0's values.
            shard = distribute_tensor(weight.detach(), mesh, placements)
            module.weight = nn.Parameter(shard, requires_grad=weight.requires_grad)
        embedding.num_embeddings = head.vocab_size = head.out_features = len(resized[0])
        return embedding


def _is_in_fsdp(model: nn.Module) -> bool:
    return any(hasattr(module, "set_requires_gradient_sync") for module in model.modules())


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _whole(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state whole, in host memory of rank 0; empty tensors in the other ranks' place. Collective.

    Names that share a parameter share its tensor.
    """
    gathered: dict[int, Tensor] = {}
    for tensor in model.state_dict(keep_vars=True).values():
        if id(tensor) not in gathered:
            whole = _whole(tensor)
            gathered[id(tensor)] = whole.cpu() if _rank() == 0 else whole.new_empty(0, device="meta")
    return {name: gathered[id(tensor)] for name, tensor in model.state_dict(keep_vars=True).items()}


def transformers_class(kind: type) -> type:
    """The class that a converted model had: its own, less what conversion and FSDP have put in front."""
    ours = ("lightning_npu_tp", "torch")
    return next(base for base in kind.__mro__ if base.__module__.partition(".")[0] not in ours)


def require_all_ranks(call: str, seconds: float = _SECONDS) -> None:
    """Wait until every rank has made this call as often as this one.

    Raises ConfigError after `seconds`: the call is collective, and often made where `is_global_zero`.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    _calls[call] += 1
    store, key = _get_default_store(), f"lightning_npu_tp/{call}/{_calls[call]}"
    end, world = time.monotonic() + seconds, dist.get_world_size()
    store.add(key, 1)
    while (arrived := store.add(key, 0)) < world:
        if time.monotonic() > end:
            raise ConfigError(
                f"{call}() was called by {arrived} of the {world} ranks; it gathers shards, so that all must call it. "
                f"Call it on every rank, not only where trainer.is_global_zero: rank 0 alone writes."
            )
        time.sleep(0.01)
