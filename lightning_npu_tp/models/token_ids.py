"""Token ids that a model's config names, against its vocabulary. Ids of a batch are the layers' business."""

from __future__ import annotations

from typing import Any

from lightning_npu_tp.errors import ConfigError


def require_padding_in_vocabulary(config: Any, whose: str) -> None:
    """Raise ConfigError for a pad_token_id that has no row in the embedding, which torch refuses without its name.

    whose: the setting that the config came from, for the message.
    """
    pad, size = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if pad is None or size is None or pad < size:
        return
    raise ConfigError(
        f"{whose} has pad_token_id={pad}, but its vocabulary of vocab_size={size} ends with {size - 1}: the token was "
        f"added to the tokenizer and not to the model. Set pad_token_id in config.json to null or to a token that the "
        f"model has, such as eos_token_id; labels say what is padding."
    )
