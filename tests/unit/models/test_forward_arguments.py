"""Arguments of the forward that nothing reads are refused with their names, and those that somebody reads arrive.

Catches a keyword that disappears in a `**kwargs`: a typing error in `labels` would train without a loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2DecoderLayer, DeepseekV2ForCausalLM

from lightning_npu_tp.convert.convert import convert
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.kernels import select
from lightning_npu_tp.models.layers.forward_arguments import choose_states
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes
from lightning_npu_tp.tools.testing.models import random_batch, reference_model, tiny_config, tiny_deepseek_v2_config
from lightning_npu_tp.tools.testing.reference import float64_reference, relative_difference


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: Any) -> Any:
    meshes = Meshes.build(Layout(1, 1, 1), "cpu")
    settings = {"meshes": meshes, "groups": Groups(meshes), "kernels": select("cpu"), "device": torch.device("cpu")}
    convert(model, **settings, dtype=None, seed=0)
    return model.train()


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return random_batch(tiny_deepseek_v2_config(), 2, 9, seed=0)


REFUSED = [
    ({"lables": torch.zeros(2, 9)}, "'lables', which nothing in it reads. Did you mean labels?"),
    ({"token_type_ids": torch.zeros(2, 9)}, "'token_type_ids'.*Leave it out"),
    ({"is_causal": False}, "is_causal=False"),
    ({"cu_seq_lens_q": torch.tensor([0, 4, 9])}, "cu_seq_lens_q without position_ids"),
    ({"attention_mask": {"full_attention": None}}, r"dictionary of \['full_attention'\]"),
    ({"logits_to_keep": 2}, "leaves 4 positions and there are 18 labels"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[next(iter(each)) for each, _ in REFUSED])
def test_what_nothing_reads_is_refused(batch: dict[str, Tensor], arguments: dict[str, Any], message: str) -> None:
    model = sharded(reference_model(tiny_deepseek_v2_config()))
    with pytest.raises(ConfigError, match=message):
        model(**batch, **arguments)
    if not arguments.keys() & {"logits_to_keep", "lables"}:
        with pytest.raises(ConfigError, match=message):
            model.model(input_ids=batch["input_ids"], **arguments)


def test_what_says_nothing_is_no_matter(batch: dict[str, Tensor]) -> None:
    model = sharded(reference_model(tiny_deepseek_v2_config()))
    positions = torch.arange(9)[None] % 5
    said = {"cu_seq_lens_q": torch.tensor([0, 5, 9]), "max_length_q": 5, "is_causal": True, "token_type_ids": None}
    output = model(**batch, position_ids=positions, **said)
    assert torch.equal(output.loss, model(**batch, position_ids=positions).loss)


class Scaled(DeepseekV2DecoderLayer):
    def forward(self, hidden_states: Tensor, factor: float = 1.0, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states, **kwargs) * factor


def test_a_keyword_reaches_the_layer_and_the_loss_of_a_users_own(batch: dict[str, Tensor]) -> None:
    model = reference_model(tiny_deepseek_v2_config())
    model.model.layers[1].__class__ = Scaled
    model = sharded(model)
    with pytest.raises(TypeError, match="factor"):
        # The other layers are transformers', which would swallow it.
        model(**batch, factor=0.5)
    for layer in model.model.layers:
        layer.__class__ = type(model.model.layers[1])
    assert not torch.equal(model(**batch, factor=0.5).loss, model(**batch).loss)
    model.loss_function = lambda logits, labels, vocab_size, weight=1.0: weight * logits.sum()
    assert torch.equal(model(**batch, weight=2.0).loss, 2 * model(**batch).loss)
    with pytest.raises(TypeError, match="'wieght'"):
        model(**batch, wieght=2.0)


class Doubled(DeepseekV2ForCausalLM):
    def forward(self, *args: Any, twice: bool = True, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.loss = output.loss * (2 if twice else 1)
        return output


def test_the_forward_of_a_subclass_runs_around_ours(batch: dict[str, Tensor]) -> None:
    model = reference_model(tiny_deepseek_v2_config())
    model.__class__ = Doubled
    model = sharded(model)
    assert torch.equal(model(**batch).loss, 2 * model(**batch, twice=False).loss)


def test_hooks_of_the_head_see_all_logits_and_change_the_loss(batch: dict[str, Tensor]) -> None:
    """The loss on shards calls no head; a cap on the logits, say, is a hook that must not be passed over."""
    with float64_reference():
        reference = reference_model(tiny_deepseek_v2_config())
    model = sharded(reference_model(tiny_deepseek_v2_config()))
    for each in (model, reference):
        each.lm_head.register_forward_hook(lambda _, inputs, logits: 2 * logits)
    with float64_reference():
        wanted = reference(**batch)
    actual = model(**batch)
    assert relative_difference(actual.loss, wanted.loss) < 1e-10
    assert relative_difference(actual.logits, wanted.logits) < 1e-10


def test_two_balance_losses_at_once_are_refused(batch: dict[str, Tensor]) -> None:
    model = sharded(reference_model(tiny_config("mixtral", aux_loss_alpha=0.1)))
    with pytest.raises(ConfigError, match="aux_loss_alpha=0.1"):
        model(**batch, output_router_logits=True)


def test_hidden_states_are_chosen_by_index() -> None:
    states = [torch.tensor(i) for i in range(4)]
    assert choose_states(states, True) == tuple(states)
    assert choose_states(states, [0, -1, 9]) == (states[0], None, None, states[3])
    assert choose_states(states, -2) == (None, None, states[2], None)
