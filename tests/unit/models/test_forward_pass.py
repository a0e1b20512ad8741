"""What a forward pass carries reaches every layer that needs it and stays nowhere.

Catches a tensor that is left on a module for the next step or for a copy, a layer of the user's whose own forward is
passed over, and one that loses the pass, whose balance losses would silently be missing.
"""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2DecoderLayer, DeepseekV2Model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from lightning_npu_tp.convert.convert import Options, convert
from lightning_npu_tp.errors import ConversionError
from lightning_npu_tp.kernels import select
from lightning_npu_tp.models.layers.sharded_causal_lm import ShardedDecoderLayer
from lightning_npu_tp.parallel.forward_pass import ForwardPass, Memory
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes
from lightning_npu_tp.parallel.tensor_region import Region
from lightning_npu_tp.tools.testing.models import random_batch, reference_model, tiny_config, tiny_deepseek_v2_config
from lightning_npu_tp.tools.testing.reference import float64_reference, relative_difference

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


class Narrow(LlamaDecoderLayer):
    """Takes what it needs by name and nothing else."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, position_embeddings: Any = None) -> Tensor:
        out = super().forward(hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings)
        return hidden_states + 0.5 * (out - hidden_states)


class OwnLayer(torch.nn.Module):
    """No class of transformers' among its parents; parallel attention and MLP."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        for name, part in source.named_children():
            self.add_module(name, part)

    def forward(self, hidden_states: Tensor, *, position_embeddings: Any, attention_mask: Any = None) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(
            hidden_states=normed, position_embeddings=position_embeddings, attention_mask=attention_mask
        )
        return hidden_states + attended + self.mlp(self.post_attention_layernorm(hidden_states))


def in_place(model: Any, kind: type) -> Any:
    """The model with layers of that class; of transformers' decoder it gets what it takes."""
    taken = inspect.signature(kind.forward).parameters
    for index, layer in enumerate(model.model.layers):
        own = kind(layer) if kind is OwnLayer else layer
        own.__class__ = kind
        own.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {k: v for k, v in kwargs.items() if k in taken or k == "step"}),
            with_kwargs=True,
        )
        model.model.layers[index] = own
    return model


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("kind", [Narrow, OwnLayer])
def test_a_layer_of_the_users_own_need_not_know_of_the_pass(kind: type, recompute: str) -> None:
    config = tiny_config("llama")
    batch = random_batch(config, 2, 9, seed=0)
    with float64_reference():
        plain = in_place(reference_model(config, attention="sdpa"), kind)
        wanted = plain(**batch).loss
        wanted.backward()
    model = convert_on_one_rank(in_place(reference_model(config), kind), recompute=recompute)
    loss = model(**batch).loss
    loss.backward()
    assert type(model.model.layers[0]).__name__ in ("ShardedNarrow", "OwnLayer")
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert relative_difference(a.grad.to_local(), b.grad) < 1e-12, name


def test_one_with_experts_that_does_not_take_the_pass_is_refused_by_name() -> None:
    model = in_place(reference_model(tiny_deepseek_v2_config()), OwnLayer)
    with pytest.raises(ConversionError, match=r"Layer 1, a OwnLayer, ran without the ForwardPass"):
        convert_on_one_rank(model)(**random_batch(model.config, 2, 9, seed=0))


class Doubled(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def put_norm(model: Any) -> None:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return 2 * hidden_states

    model.model.norm.__class__ = type("LlamaRMSNorm", (LlamaRMSNorm,), {"__module__": "mine", "forward": forward})


def put_mlp(model: Any) -> None:
    model.model.layers[0].mlp.__class__ = type("WideMLP", (LlamaMLP,), {"__module__": "mine"})


def put_projection(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.__class__ = Doubled


def put_head(model: Any) -> None:
    model.lm_head.__class__ = Doubled


@pytest.mark.parametrize(
    ("put", "named"),
    [
        (put_norm, r"model.norm \(LlamaRMSNorm\) has a forward of its own"),
        (put_mlp, "model.layers.0.mlp is a WideMLP"),
        (put_projection, r"model.layers.1.self_attn.q_proj \(Doubled\) has a forward of its own"),
        (put_head, "lm_head is a Doubled"),
    ],
)
def test_a_class_of_the_users_own_whose_forward_would_be_lost_is_refused_by_name(put: Any, named: str) -> None:
    model = reference_model(tiny_config("llama"))
    put(model)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ConversionError, match=named):
        convert_on_one_rank(model)
    assert [type(module) for module in model.modules()] == kinds, "refused before anything is changed"


def test_an_activation_of_the_users_own_in_a_dense_mlp_is_kept() -> None:
    class Squared(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square()

    model, batch = reference_model(tiny_config("llama")), random_batch(tiny_config("llama"), 2, 9, seed=0)
    plain = convert_on_one_rank(reference_model(tiny_config("llama")))(**batch).loss
    for layer in model.model.layers:
        layer.mlp.act_fn = Squared()
    assert not torch.equal(convert_on_one_rank(model)(**batch).loss, plain)


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
