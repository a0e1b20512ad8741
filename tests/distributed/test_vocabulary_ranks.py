"""Token ids and labels that the vocabulary does not have: an error, as in one process, whoever looks them up.

Catches a plausible loss of an id that is simply another rank's, on every rank. What counts nothing, -100 or another
`ignore_index`, stays no error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_npu_tp import kernels
from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.convert.data_parallel import reset_after_failed_step
from lightning_npu_tp.errors import VocabularyError
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.tools.testing.models import tiny_deepseek_v2_config
from lightning_npu_tp.tools.testing.sharded import sharded_model

LAYOUTS = {
    "one process": ((1, 1, 1), Options()),
    "tensor 2": ((1, 2, 2), Options()),
    "tensor 2, slices": ((1, 2, 2), Options(sequence_parallel=True)),
    "data 2 shard": ((2, 1, 1), Options()),
    "data 2 replicate": ((2, 1, 1), Options(data_parallel="replicate")),
    "data 2, tensor 2, expert 4": ((2, 2, 4), Options(sequence_parallel=True)),
}
# Two ranks do not divide it.
VOCABULARY = 131
OUTSIDE = (131, 1000, -1)
PARTS = ("decoder", "embedding", "head")


def with_one(number: int) -> Tensor:
    """Ids [2, 6] of which one, not the first, is `number`."""
    ids = torch.arange(12).reshape(2, 6)
    ids[1, 2] = number
    return ids


def ways(model: Any) -> dict[str, tuple[str, Callable[[Tensor], Any]]]:
    """Everything that looks up ids or labels, and what it calls them."""
    good = with_one(3)
    width = model.config.hidden_size
    embeds = torch.ones(2, 6, width, dtype=torch.float64)
    hidden = torch.ones(12, width, dtype=torch.float64)
    return {
        "ids": ("token id", lambda x: model(input_ids=x, labels=good)),
        "ids without labels": ("token id", lambda x: model(input_ids=x)),
        "decoder": ("token id", lambda x: model.model(input_ids=x)),
        "embedding": ("token id", lambda x: model.get_input_embeddings()(x)),
        "labels": ("label", lambda x: model(input_ids=good, labels=x)),
        "shifted labels": ("label", lambda x: model(input_ids=good, shift_labels=x)),
        "labels of embeddings": ("label", lambda x: model(inputs_embeds=embeds, labels=x)),
        "head": ("label", lambda x: model.lm_head.token_losses(hidden, x.flatten())),
    }


def look_up(rank: int, world_size: int, sizes: tuple[int, ...], options: Options) -> dict[str, list[str]]:
    """What each way tells of ids beyond the vocabulary and below it; every rank has the same."""
    config = tiny_deepseek_v2_config(num_hidden_layers=2, vocab_size=VOCABULARY)
    model, _ = sharded_model(config, Layout(*sizes), options)
    told: dict[str, list[str]] = {}
    with torch.no_grad():
        for name, (what, call) in ways(model).items():
            if sizes[0] > 1 and name in PARTS:
                # What a part that is called by itself computes of a data rank's slice is another test's.
                continue
            for number in OUTSIDE:
                with pytest.raises(VocabularyError) as raised:
                    call(with_one(number))
                reset_after_failed_step(model)
                assert str(raised.value).startswith(f"A {what} is not in the model's vocabulary, 0 to 130"), name
                told.setdefault(name, []).append(str(raised.value))
            call(with_one(VOCABULARY - 1))
            call(with_one(0))
        ignored = model(input_ids=with_one(3), labels=with_one(-100)).loss
    assert torch.isfinite(ignored)
    return told


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_id_outside_of_the_vocabulary_is_an_error_in_every_layout(on_ranks: Any, layout: str) -> None:
    sizes, options = LAYOUTS[layout]
    for told in on_ranks(look_up, sizes[0] * sizes[1], sizes, options):
        assert len(told) == 8 - len(PARTS) * (sizes[0] > 1)
        for texts in told.values():
            assert all(f": {number} at [" in text for number, text in zip(OUTSIDE, texts, strict=True)), texts


def marked(rank: int, world_size: int) -> tuple[list[bool], float, float]:
    """What a card that can tell nothing computes: whether ids outside make NaN, and the same as elsewhere inside."""
    config = tiny_deepseek_v2_config(num_hidden_layers=2, vocab_size=VOCABULARY)
    options = Options(sequence_parallel=True)
    silent = kernels.select("cpu", {"vocabulary": "reference"})
    model, _ = sharded_model(config, Layout(1, 2, 2), options, chosen=silent)
    good = with_one(3)
    with torch.no_grad():
        found = [bool(model(input_ids=with_one(n), labels=good).loss.isnan()) for n in (131, -1)]
        found += [bool(model(input_ids=good, labels=with_one(n)).loss.isnan()) for n in (131, -1)]
        loss = float(model(input_ids=good, labels=with_one(-100)).loss)
        ignored = model.lm_head.token_losses(torch.ones(12, 64, dtype=torch.float64), with_one(-7).flatten(), -7)
    return found, loss, float(ignored[8])


def test_where_a_device_can_raise_nothing_the_loss_is_nan_and_what_counts_nothing_counts_nothing(on_ranks: Any) -> None:
    (first, loss, ignored), (second, other, _) = on_ranks(marked, 2)
    assert first == second == [True] * 4
    assert loss == other and loss == loss and ignored == 0.0
