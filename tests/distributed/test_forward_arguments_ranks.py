"""Every argument of transformers' forward gives in any layout what one process gives, or is refused with its name.

Catches one that is swallowed on its way down (hidden states that are None, a balance loss that is missing), one whose
result is a rank's part, and one that loses its gradient: all tensors of the output are compared in float64, and the
gradients of their sum with fixed weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.tools.testing.models import random_batch, reference_model, tiny_config
from lightning_npu_tp.tools.testing.reference import float64_reference, relative_difference
from lightning_npu_tp.tools.testing.sharded import gradient, own_rows, sharded_model, whole

# Double rounding over a few thousand additions per element; a real mistake is 1e-3 and more.
TOLERANCE = 1e-10
FAMILIES = ("deepseek_v2", "deepseek_v3", "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "llama", "qwen2", "qwen3")
LAYOUTS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "tensor": ((1, 2, 2), {}),
    "sliced": ((1, 2, 2), {"sequence_parallel": True, "recompute": "block"}),
    "shard": ((2, 1, 2), {}),
    "replicate": ((2, 1, 1), {"data_parallel": "replicate"}),
    "both": ((2, 2, 4), {}),
}


# Four positions back, as a mask that is added to the scores.
BAND = torch.zeros(9, 9, dtype=torch.float64).masked_fill(~torch.ones(9, 9).tril().triu(-3).bool(), float("-inf"))


def every_fifth(labels: Tensor) -> Tensor:
    return torch.where(torch.arange(labels.shape[1]) % 5 == 0, 7, labels)


def thrice(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """A loss of the user's own: not shifted, and of all logits."""
    return 3 * torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), labels.flatten())


# What is passed to the forward, made of a model and a batch of input_ids and labels; both may be changed.
CASES: dict[str, Callable[[Any, dict[str, Tensor]], dict[str, Any]]] = {
    "plain": lambda model, batch: batch,
    "num_items_in_batch": lambda model, batch: {**batch, "num_items_in_batch": torch.tensor(5)},
    "ignore_index": lambda model, batch: {**batch, "labels": every_fifth(batch["labels"]), "ignore_index": 7},
    "shift_labels": lambda model, batch: {**batch, "shift_labels": batch["labels"].roll(3, 1)},
    "output_hidden_states": lambda model, batch: {**batch, "output_hidden_states": True},
    "chosen hidden states": lambda model, batch: {**batch, "output_hidden_states": [0, -1]},
    "output_attentions": lambda model, batch: {**batch, "output_attentions": True},
    "output_router_logits": lambda model, batch: {**batch, "output_router_logits": True},
    "everything shown": lambda model, batch: {
        "input_ids": batch["input_ids"],
        **{f"output_{name}": True for name in ("hidden_states", "attentions", "router_logits")},
    },
    "last logits": lambda model, batch: {"input_ids": batch["input_ids"], "logits_to_keep": 3},
    "chosen logits": lambda model, batch: {
        "input_ids": batch["input_ids"],
        "logits_to_keep": torch.tensor([0, 2]),
    },
    "logits by sequence": lambda model, batch: {
        "input_ids": batch["input_ids"],
        "logits_to_keep": torch.arange(3).expand(len(batch["input_ids"]), 3),
    },
    "masked logits": lambda model, batch: {
        "input_ids": batch["input_ids"],
        "logits_to_keep": batch["input_ids"] % 2 == 0,
    },
    "loss of some logits": lambda model, batch: {
        **batch,
        "logits_to_keep": 4,
        "shift_labels": batch["labels"][:, -4:].contiguous(),
    },
    "inputs_embeds": lambda model, batch: {
        "inputs_embeds": torch.sin(batch["input_ids"][..., None] * torch.arange(model.config.hidden_size).double()),
        "labels": batch["labels"],
    },
    "position_ids": lambda model, batch: {**batch, "position_ids": torch.arange(9)[None] % 5, "use_cache": False},
    "mask of four dimensions": lambda model, batch: {
        **batch,
        # What is added to the scores: transformers' eager attention takes no other.
        "attention_mask": BAND[None, None],
    },
    "return_dict": lambda model, batch: {**batch, "return_dict": False, "output_hidden_states": True},
}


def fields(output: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an output by name, those in tuples too; caches are left out."""
    named = output.items() if isinstance(output, dict) else enumerate(output)
    for name, value in named:
        if isinstance(value, Tensor):
            yield str(name), value
        elif isinstance(value, tuple):
            yield from ((f"{name} {index}", each) for index, each in enumerate(value) if each is not None)


def answer(model: Any, arguments: dict[str, Any], only: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], dict]:
    """All tensors of the model's output, and the gradients of their sum with fixed weights."""
    model.zero_grad()
    found = {name: tensor for name, tensor in fields(model(**arguments)) if not only or name in only}
    weights = {name: torch.linspace(-1, 2, tensor.numel(), dtype=torch.float64) for name, tensor in found.items()}
    torch.stack([(tensor.flatten() * weights[name]).sum() for name, tensor in found.items()]).sum().backward()
    gradients = {name: whole(gradient(p)).clone() for name, p in model.named_parameters()}
    return {name: tensor.detach() for name, tensor in found.items()}, gradients


def mean(several: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in several]).mean(0) for name in several[0]}


def worst(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    assert actual.keys() == wanted.keys(), f"{sorted(actual)} instead of {sorted(wanted)}"
    return max((relative_difference(actual[name], wanted[name]), name) for name in wanted)


@cache
def config_of(family: str) -> Any:
    # A factor that makes the balance loss weigh; only four families have it.
    return tiny_config(family, router_aux_loss_coef=0.5)


def differences(rank: int, world_size: int, family: str, layout: str) -> dict[str, tuple[float, str]]:
    """Worst difference to one process of each case, and where."""
    sizes, options = LAYOUTS[layout]
    config, data = config_of(family), sizes[0]
    with float64_reference():
        reference = reference_model(config)
    model, _ = sharded_model(config, Layout(*sizes), Options(**options))
    batch, data_rank = random_batch(config, 2 * data, 9, seed=0), rank // sizes[1]
    padded = random_batch(config, 2 * data, 9, seed=1, padding=True)
    found = {}

    def compare(case: str, batch: dict, make: Callable, only: tuple[str, ...] = (), loss_function: Any = None) -> None:
        for each in (model, reference) if loss_function else ():
            each.loss_function = loss_function
        actual, gradients = answer(
            model, {**make(model, own_rows(batch, data_rank, data)[1]), "gather_logits": True}, only
        )
        with float64_reference():
            alone = [answer(reference, make(reference, own_rows(batch, r, data)[1]), only) for r in range(data)]
        for each in (model, reference) if loss_function else ():
            del each._loss_function
        outputs = worst(actual, alone[data_rank][0])
        # An expert that no token of a rank reached has no gradient there, and zero in the mean.
        found[case] = max(outputs, worst(gradients, mean([each[1] for each in alone])))

    for case, make in CASES.items():
        compare(case, batch, make)
    compare("loss_function", batch, CASES["plain"], loss_function=thrice)
    shown = CASES["output_router_logits"]
    # What padding attends to is nobody's contract, so that only what leaves it out is compared.
    compare("padding", padded, shown, only=("loss", "aux_loss"))
    found["past_key_values"] = with_cache(model, reference, own_rows(batch, data_rank, data)[1]["input_ids"])
    dist.barrier()
    return found


def with_cache(model: Any, reference: Any, input_ids: Tensor) -> tuple[float, str]:
    """Logits of the end of sequences whose beginning is in a cache, in two ways to hand one over."""

    def logits(model: Any) -> dict[str, Tensor]:
        first = model(input_ids=input_ids[:, :5], use_cache=True)
        second = model(input_ids=input_ids[:, 5:], past_key_values=first.past_key_values)
        decoder = model.model(input_ids=input_ids, use_cache=True, return_dict=False)
        return {"logits": second.logits, "decoder": decoder[0], "length": torch.tensor(float(len(decoder)))}

    with torch.no_grad():
        actual = logits(model.eval())
        with float64_reference():
            return worst(actual, logits(reference.eval()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_argument_of_the_forward_gives_the_numbers_of_one_process(
    on_ranks: Any, family: str, layout: str
) -> None:
    world = Layout(*LAYOUTS[layout][0]).world
    for rank, found in enumerate(on_ranks(differences, world, family, layout, timeout=120)):
        assert found.keys() >= CASES.keys()
        for case, (difference, where) in found.items():
            assert difference <= TOLERANCE, f"rank {rank}, {case}: {where} differs by {difference:.3e}"
