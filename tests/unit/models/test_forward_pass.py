"""What a forward pass carries reaches every layer that needs it and stays nowhere.

Catches a tensor that is left on a module for the next step or for a copy, a layer of the user's whose own forward is
passed over, and one that loses the pass, whose balance losses would silently be missing.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2DecoderLayer, DeepseekV2Model

from lightning_npu_tp.convert.convert import Options, convert
from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.kernels import select
from lightning_npu_tp.models.layers.sharded_causal_lm import ShardedDecoderLayer
from lightning_npu_tp.parallel.forward_pass import ForwardPass, Memory
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes
from lightning_npu_tp.parallel.tensor_region import Region
from lightning_npu_tp.tools.testing.models import random_batch, reference_model, tiny_deepseek_v2_config

COUNTS = {"tokens_per_expert", "pending_tokens_per_expert"}


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def converted(layer: type | None = None, decoder: type | None = None, **options: Any) -> Any:
    model = reference_model(tiny_deepseek_v2_config(aux_loss_alpha=0.05))
    for each in model.model.layers if layer is not None else ():
        each.__class__ = layer
        each.drop = torch.nn.Dropout(0.0) if layer is Noisy else None
    if decoder is not None:
        model.model.__class__ = decoder
    return convert_on_one_rank(model, **options)


def convert_on_one_rank(model: Any, **options: Any) -> Any:
    meshes = Meshes.build(Layout(1, 1, 1), "cpu")
    convert(
        model,
        meshes=meshes,
        groups=Groups(meshes),
        kernels=select("cpu"),
        device=torch.device("cpu"),
        dtype=None,
        seed=0,
        options=Options(**options),
    )
    return model.train()


def tensors_on_modules(model: Any) -> set[str]:
    """Attributes that are tensors or hold some, of all modules; parameters and buffers are not among them."""

    def holds(value: Any) -> bool:
        if isinstance(value, (Tensor, ForwardPass)):
            return True
        # Rotary tables keep their frequencies by device.
        return isinstance(value, (list, tuple)) and any(holds(each) for each in value)

    return {name for module in model.modules() for name, value in vars(module).items() if holds(value)}


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_model_holds_nothing_of_a_step_but_its_counts_and_a_copy_not_even_those(recompute: str) -> None:
    model = converted(recompute=recompute)
    before = tensors_on_modules(model)
    output = model(**random_batch(model.config, 2, 9, seed=0, padding=True))
    assert tensors_on_modules(model) - before == COUNTS
    (output.loss + output.aux_loss).backward()
    assert tensors_on_modules(model) - before == COUNTS
    assert not tensors_on_modules(copy.deepcopy(model)) & COUNTS


def test_two_passes_do_not_meet() -> None:
    """The second forward runs between the first one and its backward, which recomputes."""
    first, second = (random_batch(tiny_deepseek_v2_config(), 2, 9, seed=seed, padding=seed == 0) for seed in (0, 1))

    def gradients(*, mixed: bool) -> list[Tensor]:
        model = converted(recompute="block")
        output = model(**first)
        if mixed:
            model(**second)
        (output.loss + output.aux_loss).backward()
        return [parameter.grad.to_local() for parameter in model.parameters() if parameter.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradients(mixed=False), gradients(mixed=True), strict=True))


class Scaled(DeepseekV2DecoderLayer):
    calls = 0

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.calls += 1
        return super().forward(hidden_states, **kwargs) * 0.5


class Noisy(DeepseekV2DecoderLayer):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self.drop(super().forward(hidden_states, **kwargs))


class Rewritten(DeepseekV2DecoderLayer):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return hidden_states + self.mlp(self.input_layernorm(hidden_states))


def test_a_layer_of_the_users_own_still_runs_around_ours() -> None:
    batch = random_batch(tiny_deepseek_v2_config(), 2, 9, seed=0)
    plain, model = converted(), converted(Scaled)
    output = model(**batch)
    assert [layer.calls for layer in model.model.layers] == [1, 1, 1]
    assert output.aux_loss is not None and not torch.equal(output.loss, plain(**batch).loss)
    assert isinstance(model.model.layers[0], Scaled) and isinstance(model.model.layers[0], ShardedDecoderLayer)


def test_a_layer_that_loses_the_pass_is_refused_by_name() -> None:
    model = converted(Rewritten)
    with pytest.raises(ConversionError, match=r"Layer 1, a ShardedRewritten, ran without the ForwardPass"):
        model(**random_batch(model.config, 2, 9, seed=0))


def test_a_layer_with_other_parts_is_refused_by_name() -> None:
    model = reference_model(tiny_deepseek_v2_config())
    model.model.layers[0].another_norm = torch.nn.Identity()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ConversionError, match=r"DecoderLayer has the parts \['another_norm', 'input_layernorm'"):
        convert_on_one_rank(model)
    assert [type(module) for module in model.modules()] == kinds, "refused before anything is changed"


def test_a_layer_of_the_users_own_may_have_more_parts() -> None:
    model = converted(Noisy)
    model(**random_batch(model.config, 2, 9, seed=0))
    assert isinstance(model.model.layers[0], ShardedDecoderLayer)


def live_tensors() -> int:
    gc.collect()
    # Not isinstance, which asks some modules' objects for their class.
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("what", ["loss alone", "no backward", "error"])
def test_a_step_keeps_nothing_alive_that_the_next_one_does_not(recompute: str, what: str) -> None:
    model = converted(recompute=recompute)
    batch, counts = random_batch(model.config, 2, 9, seed=0), []
    for _ in range(4):
        if what == "error":
            with pytest.raises(TypeError):
                model(**batch, logits_to_keep="none", gather_logits=True)
        else:
            output = model(**batch)
            assert output.aux_loss is not None
            if what == "loss alone":
                output.loss.backward()
            del output
        model.zero_grad()
        counts.append(live_tensors())
    assert len(set(counts[1:])) == 1, counts


def test_a_pre_hook_that_hands_on_another_input_loses_no_balance_loss() -> None:
    batch = random_batch(tiny_deepseek_v2_config(), 2, 9, seed=0)
    plain, model = converted(), converted()
    for module in model.modules():
        if type(module).__name__ in ("MoEBlock", "RMSNorm", "ShardedMLP", "VocabEmbedding"):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 1,))
    assert torch.equal(model(**batch).aux_loss, plain(**batch).aux_loss)


def test_layers_that_are_called_by_themselves_are_counted_once_under_recompute() -> None:
    model = converted(recompute="block")
    layer = model.model.layers[1]
    hidden = torch.randn(2, 9, model.config.hidden_size, requires_grad=True)
    tables = model.model.rotary_emb(hidden, torch.arange(9)[None])
    out = layer(hidden, position_embeddings=tables)
    before = layer.mlp.pending_tokens_per_expert.clone()
    out.sum().backward()
    assert torch.equal(layer.mlp.pending_tokens_per_expert, before) and int(before.sum()) > 0


def loop(decoder: Any, input_ids: Tensor, **kwargs: Any) -> Any:
    hidden = decoder.embed_tokens(input_ids)
    tables = decoder.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
    for layer in decoder.layers:
        hidden = layer(hidden, position_embeddings=tables, **kwargs)
    return BaseModelOutputWithPast(last_hidden_state=decoder.norm(hidden))


class LosesThePass(DeepseekV2Model):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return loop(self, input_ids)


class HandsItOn(DeepseekV2Model):
    def forward(self, input_ids: Tensor, step: ForwardPass | None = None, **kwargs: Any) -> Any:
        return loop(self, input_ids, step=step)


def test_a_decoder_of_the_users_own_hands_the_pass_on_or_is_refused_by_name() -> None:
    batch = random_batch(tiny_deepseek_v2_config(), 2, 9, seed=0)
    with pytest.raises(ConversionError, match=r"Layer 1, a ShardedDeepseekV2DecoderLayer, ran without the ForwardPass"):
        converted(decoder=LosesThePass)(**batch)
    assert converted(decoder=HandsItOn)(**batch).aux_loss is not None


def test_balance_losses_that_nobody_can_read_are_told() -> None:
    model = converted()
    with pytest.warns(UserWarning, match="balance losses of .* are lost"):
        model.model(input_ids=random_batch(model.config, 2, 9, seed=0)["input_ids"])


def test_a_second_run_is_told_what_the_first_one_decided_and_its_losses_go_nowhere() -> None:
    step, memory = ForwardPass(Region(Groups())), Memory()
    assert not step.is_second_run and step.remember(lambda: 1) == 1
    answers = []
    for run in (1, 2, 3):
        memory.begin_run()
        this = step.with_memory(memory) if run == 1 else step.without_results(memory)
        answers.append([this.remember(lambda run=run, part=part: (run, part)) for part in "ab"])
        this.balance_losses.append(torch.tensor(float(run)))
        assert this.is_second_run is (run > 1)
    assert answers == [[(1, "a"), (1, "b")]] * 3 and step.balance_losses == [torch.tensor(1.0)]
