"""A model whose parts are called past its `__call__`, over data ranks, has the losses and gradients of one process.

Catches a data rank's slice that is taken for the whole where an embedding, a head, a layer's part or `forward` is
called, gradients of such calls that stay one rank's own, a first call that makes FSDP refuse all later ones, weights of
before the optimizer's step that a forward pass without a backward pass left behind, and calls after the trainer's end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.errors import ConfigError, ConversionError
from lightning_npu_tp.tools.testing.models import reference_model, tiny_config
from lightning_npu_tp.tools.testing.reference import float64_reference, relative_difference
from lightning_npu_tp.tools.testing.sharded import whole

LENGTH = 11

Way = Callable[[Any, Tensor], Tensor]


def mean_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def by_forward(model: Any, ids: Tensor) -> Tensor:
    return model.forward(input_ids=ids, labels=ids).loss


def decoder_then_head(model: Any, ids: Tensor) -> Tensor:
    return mean_loss(model.lm_head(model.model(input_ids=ids).last_hidden_state), ids)


def forward_of_the_parts(model: Any, ids: Tensor) -> Tensor:
    return mean_loss(model.lm_head.forward(model.model.forward(input_ids=ids).last_hidden_state), ids)


def embedding_then_model(model: Any, ids: Tensor) -> Tensor:
    embedded = model.get_input_embeddings()(ids)
    return model(inputs_embeds=embedded, labels=ids).loss + 0.1 * embedded.pow(2).mean()


def layer_by_layer(model: Any, ids: Tensor) -> Tensor:
    """Attention, norms and MLP of the first layer each by itself, the others as layers."""
    decoder = model.model
    hidden = decoder.embed_tokens(ids)
    tables = decoder.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    first, *others = decoder.layers
    normed = first.input_layernorm(hidden)
    hidden = hidden + first.self_attn(hidden_states=normed, position_embeddings=tables, attention_mask=None)[0]
    hidden = hidden + first.mlp(first.post_attention_layernorm(hidden))
    for layer in others:
        hidden = layer(hidden, position_embeddings=tables, attention_mask=None)
    return mean_loss(model.lm_head(decoder.norm(hidden)), ids)


def parts_of_the_last_layer(model: Any, ids: Tensor) -> Tensor:
    """The last layer, which has experts where the family has some, in parts; twice, with the model between."""
    last, hidden = model.model.layers[-1], model.get_input_embeddings()(ids)
    loss = last.mlp(last.post_attention_layernorm(hidden)).pow(2).mean() + last.mlp(hidden).mean()
    return loss + model(input_ids=ids, labels=ids).loss + last.mlp(hidden * 2).pow(2).mean()


def mixed_and_twice(model: Any, ids: Tensor) -> Tensor:
    first = model(input_ids=ids, labels=ids).loss
    hidden = model.model(input_ids=ids).last_hidden_state
    again = model.lm_head(hidden).pow(2).mean() + model.lm_head(hidden * 0.5).pow(2).mean()
    return first + again + model.forward(input_ids=ids, labels=ids).loss


def checkpointed_head(model: Any, ids: Tensor) -> Tensor:
    hidden = model.model(input_ids=ids).last_hidden_state
    return checkpoint(lambda h: mean_loss(model.lm_head(h), ids), hidden, use_reentrant=False)


def head_only(model: Any, ids: Tensor) -> Tensor:
    """What is computed without gradients first is in nobody's way."""
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
        model(input_ids=ids)
    return mean_loss(model.lm_head(hidden), ids)


WAYS: tuple[Way, ...] = (
    decoder_then_head,
    by_forward,
    embedding_then_model,
    forward_of_the_parts,
    layer_by_layer,
    parts_of_the_last_layer,
    mixed_and_twice,
    checkpointed_head,
    head_only,
)


class Scored(LlamaForCausalLM):
    """A model with a method of the user's own, that uses parts and a parameter of it."""

    def score(self, ids: Tensor) -> Tensor:
        hidden = self.model(input_ids=ids).last_hidden_state
        return mean_loss(self.lm_head(hidden), ids) + F.linear(hidden, self.lm_head.weight).pow(2).mean()


def by_a_method_of_ones_own(model: Any, ids: Tensor) -> Tensor:
    return model.score(ids)


def model_of(family: str, tied: bool) -> Any:
    model = reference_model(tiny_config(family, tie_word_embeddings=tied), attention="sdpa")
    if family == "llama":
        model.__class__ = Scored
    return model


def rows() -> Tensor:
    return torch.randint(2, 128, (4, LENGTH), generator=torch.Generator().manual_seed(7))


def ways_of(family: str) -> tuple[Way, ...]:
    return (*WAYS, by_a_method_of_ones_own) if family == "llama" else WAYS


class Direct(LightningModule):
    """Goes every way, each from the same weights, and keeps what came of it."""

    def __init__(self, model: Any, ways: tuple[Way, ...]) -> None:
        super().__init__()
        self.network, self.ways = model, ways
        self.automatic_optimization = False
        self.found: dict[str, dict[str, Any]] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for way in self.ways:
            self.network.zero_grad()
            loss = way(self.network, batch)
            self.manual_backward(loss)
            gradients = {
                name: whole(p.grad).clone() for name, p in self.network.named_parameters() if p.grad is not None
            }
            self.found[way.__name__] = {"loss": self.trainer.strategy.reduce(loss).item(), "gradients": gradients}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(world_size: int, settings: dict[str, Any], **more: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=NPUTensorParallelStrategy(init_seed=0, **settings),
        precision="64-true",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, **more},
    )


def batches(rank: int, world_size: int, settings: dict[str, Any], repeat: int = 1) -> DataLoader:
    data = settings.get("data_parallel_size", 1)
    part = rows().chunk(data)[rank // (world_size // data)]
    return DataLoader(part.repeat(repeat, 1), batch_size=len(part))


def go_every_way(
    rank: int, world_size: int, family: str, tied: bool, settings: dict[str, Any], first: int
) -> dict[str, dict[str, Any]]:
    ways = ways_of(family)
    module = Direct(model_of(family, tied).train(), ways[first:] + ways[:first])
    run(world_size, settings).fit(module, batches(rank, world_size, settings))
    return module.found if rank == 0 else {}


def expected(family: str, tied: bool) -> dict[str, dict[str, Any]]:
    found = {}
    with float64_reference():
        model = model_of(family, tied).train()
        for way in ways_of(family):
            model.zero_grad()
            loss = way(model, rows())
            loss.backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            found[way.__name__] = {"loss": loss.item(), "gradients": gradients}
    return found


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor": (2, {"tensor_parallel_size": 2}),
    "shard": (2, {"data_parallel_size": 2}),
    "replicate": (2, {"data_parallel_size": 2, "data_parallel": "replicate"}),
    "recompute": (2, {"data_parallel_size": 2, "recompute": "block"}),
    "all": (4, {"data_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel_size": 4}),
    "four, replicas of experts": (
        4,
        {"data_parallel_size": 2, "tensor_parallel_size": 2, "data_parallel": "replicate"},
    ),
}


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("family", ["deepseek_v2", "llama"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_called_by_themselves_compute_what_one_process_computes(
    on_ranks: Any, layout: str, family: str, tied: bool
) -> None:
    world_size, settings = LAYOUTS[layout]
    # Another way is the first one in each layout: it finds FSDP uninitialised.
    first = list(LAYOUTS).index(layout)
    found = on_ranks(go_every_way, world_size, family, tied, settings, first, backend=None, timeout=120)[0]
    wanted = expected(family, tied)
    assert found.keys() == wanted.keys()
    for way, values in wanted.items():
        assert found[way]["loss"] == pytest.approx(values["loss"], rel=1e-10), way
        assert found[way]["gradients"].keys() >= values["gradients"].keys(), way
        for name, gradient in found[way]["gradients"].items():
            other = values["gradients"].get(name, torch.zeros_like(gradient))
            assert relative_difference(gradient, other) < 1e-10, f"{way}: {name}"


class LooksAhead(Direct):
    """Calls the model without gradients between backward pass and step, as who logs a sample does."""

    def __init__(self, model: Any, looks: bool) -> None:
        super().__init__(model, ())
        self.automatic_optimization, self.looks, self.losses = True, looks, []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.network(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.looks:
            with torch.no_grad():
                self.network(input_ids=rows())


def train_looking(rank: int, world_size: int, settings: dict[str, Any], looks: bool) -> list[float]:
    module = LooksAhead(model_of("llama", False).train(), looks)
    run(world_size, settings).fit(module, batches(rank, world_size, settings, repeat=3))
    return module.losses


def test_a_look_before_the_step_leaves_no_old_weights_behind(on_ranks: Any) -> None:
    settings = {"data_parallel_size": 2}
    looked, plain = (on_ranks(train_looking, 2, settings, looks, backend=None)[0] for looks in (True, False))
    assert len(plain) == 3 and looked == pytest.approx(plain, rel=1e-12)


def use_a_copy(rank: int, world_size: int) -> dict[str, str]:
    module = Direct(model_of("llama", False), ())
    messages = {}
    trainer = run(world_size, {"data_parallel_size": 2})

    class Copies(Direct):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            head = self.network.lm_head
            hidden = torch.zeros(1, 3, head.weight.shape[1], dtype=torch.float64)
            for name, call in {"copy": copy.deepcopy(head), "method": head.logits}.items():
                try:
                    call(hidden)
                except ConversionError as error:
                    messages[name] = str(error)

    module.__class__ = Copies
    trainer.fit(module, batches(rank, world_size, {"data_parallel_size": 2}))
    return messages


def test_a_copy_and_another_method_of_a_shared_module_are_refused(on_ranks: Any) -> None:
    for messages in on_ranks(use_a_copy, 2, backend=None):
        assert messages.keys() == {"copy", "method"}
        for message in messages.values():
            assert "shared over 2 data ranks" in message and "Call the module that it belongs to" in message


@contextmanager
def told(messages: dict[str, str], name: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        messages[name] = str(error)


def call_after_fit(rank: int, world_size: int, settings: dict[str, Any]) -> dict[str, Any]:
    module = LooksAhead(model_of("llama", False), False)
    trainer = run(world_size, settings)
    trainer.fit(module, batches(rank, world_size, settings))
    model, ids, messages = module.network, rows(), {}
    hidden = torch.zeros(1, 3, 48, dtype=torch.float64)
    for name, call in {
        "model": lambda: model(input_ids=ids),
        "forward": lambda: model.forward(input_ids=ids),
        "decoder": lambda: model.model(input_ids=ids),
        "layer": lambda: model.model.layers[0](hidden, position_embeddings=None),
        "mlp": lambda: model.model.layers[0].mlp(hidden),
        "norm": lambda: model.model.norm(hidden),
        "embedding": lambda: model.get_input_embeddings()(ids),
        "head": lambda: model.lm_head(hidden),
        "generate": lambda: model.generate(ids, max_new_tokens=2),
    }.items():
        with told(messages, name):
            call()
    assert all(value.device.type == "cpu" for value in model.state_dict().values())
    with trainer.strategy.process_group():
        again = model(input_ids=ids, labels=ids).loss.item()
        norm = model.lm_head.weight.norm().item()
    return {"messages": messages, "again": again, "norm": norm}


@pytest.mark.parametrize("how", ["shard", "replicate"])
def test_a_call_after_the_trainers_end_is_explained_whatever_is_called(on_ranks: Any, how: str) -> None:
    settings = {"data_parallel_size": 2, "data_parallel": how}
    for result in on_ranks(call_after_fit, 2, settings, backend=None):
        assert len(result["messages"]) == 9, result["messages"].keys()
        for name, message in result["messages"].items():
            assert "after the trainer had destroyed its process group" in message, name
        assert result["again"] > 0 and result["norm"] > 0
