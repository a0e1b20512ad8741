"""The batches of a proof, one for each path through a model, and one process's answers for them.

A mask takes attention another way than none does, documents that restart their positions get a mask of their own,
slices of a sequence that the tensor ranks do not divide are filled up: what no batch leads through is not proven.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.kernels import select
from lightning_npu_tp.models.families.family import BuildContext, ModelFamily
from lightning_npu_tp.models.moe.block import MoEBlock
from lightning_npu_tp.parallel.forward_pass import ForwardPass
from lightning_npu_tp.parallel.layout import Groups, Layout
from lightning_npu_tp.parallel.tensor_region import Region
from lightning_npu_tp.tools.testing.models import (
    BatchAnswer,
    packed_batch,
    random_batch,
    reference_answer,
    reference_model,
)
from lightning_npu_tp.tools.testing.reference import float64_reference
from lightning_npu_tp.tools.testing.sharded import BALANCE

# Kind of batch -> the attention that it is there for: without a mask causality is the kernel's own business.
KINDS = {
    "no mask": "causal",
    "right padding": "masked",
    "left padding": "masked",
    "packed documents": "masked",
    BALANCE: "causal",
}


def paths_of(kind: str, layout: Layout, options: Options) -> set[str]:
    """The paths that a batch of this kind must take in a layout, in the words of `BatchAnswer`."""
    paths = {KINDS[kind]}
    if options.sequence_parallel and layout.tensor > 1:
        paths.add("sliced")
    if options.recompute == "block":
        paths.add("recomputed")
    return paths


def uneven_size(layout: Layout) -> tuple[int, int]:
    """Sequences and positions that neither the data nor the tensor ranks of the layout divide."""
    rows = max(3, 2 * layout.data - 1)
    # Prime; a layout of so many tensor ranks takes the next.
    return rows, next(n for n in (17, 19, 37, 67, 131) if n > max(rows + 2, 2 * layout.tensor))


def uneven_batches(config: Any, layout: Layout) -> list[dict[str, Tensor]]:
    """Two micro-batches to be accumulated, of uneven sizes: rows of the first end early, the second has no mask."""
    rows, length = uneven_size(layout)
    return [random_batch(config, rows, length + 4 * index, seed=index, padding=index == 0) for index in range(2)]


def kind_batches(config: Any, layout: Layout, *, balance: bool) -> dict[str, dict[str, Tensor]]:
    """A batch of each of KINDS, of uneven sizes but for the packed one, whose positions the tensor ranks divide.

    balance: whether the model has balance losses, which have a batch to themselves.
    """
    rows, length = uneven_size(layout)
    even = layout.tensor * -(-length // layout.tensor)
    batches = {
        "no mask": random_batch(config, rows, length, seed=2),
        "right padding": random_batch(config, rows, length, seed=3, padding=True),
        "left padding": random_batch(config, rows, length, seed=4, padding="left"),
        "packed documents": packed_batch(config, rows, even, seed=5),
    }
    # Without padding: a data rank's mean is then weighed by its tokens as one process weighs its sequences.
    return {**batches, BALANCE: random_batch(config, rows, length, seed=6)} if balance else batches


def set_balance_losses(config: Any) -> None:
    """Give the model of a config balance losses large enough to show, of the kind that it asks for."""
    config.aux_loss_alpha, config.router_z_loss_coef = 0.05, 0.01


def not_compared(config: Any, layout: Layout) -> list[str]:
    """What training this config has and a proof has not, each with the reason."""
    found = [
        f"{name}={value} is left out: each tensor rank draws for its own heads, one process for all of them in another "
        f"order, so the numbers differ by design"
        for name, value in config.to_dict().items()
        if "dropout" in name and isinstance(value, float) and value > 0
    ]
    if layout.data > 1 and getattr(config, "seq_aux", True) is False:
        found.append(
            "the balance loss with seq_aux=False is left out: it is one over the tokens of a data rank, by design"
        )
    return found


def answers_alone(
    config: Any, family: ModelFamily, batches: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, BatchAnswer]:
    """One process's answer for each batch: transformers' loss, and the family's balance losses of its router."""
    model = reference_model(config)
    answers = {}
    for name, batch in batches.items():
        with _balance_losses(model, family) if name == BALANCE else _none() as losses:
            answers[name] = reference_answer(model, batch, losses)
    return answers


@contextmanager
def _none() -> Iterator[Sequence[Tensor]]:
    yield ()


@contextmanager
def _balance_losses(model: nn.Module, family: ModelFamily) -> Iterator[Sequence[Tensor]]:
    """While inside, a forward of transformers' model fills the list with a loss per mixture layer.

    transformers computes none of these: they are taken of the family's own block, in one piece, which shares the
    router's weight with transformers' and sees what that sees.
    """
    region = Region(Groups())
    step, context = ForwardPass(region), BuildContext(region, select("cpu"), model.config)

    def look(block: MoEBlock, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        block(arguments[0], step)

    hooks = []
    for module in list(model.modules()):
        make = family.swaps.get(type(module).__name__)
        block = make(module, context) if make is not None and hasattr(module, "experts") else None
        if isinstance(block, MoEBlock):
            hooks.append(module.register_forward_pre_hook(partial(look, block)))
    yield step.balance_losses
    for hook in hooks:
        hook.remove()


def expert_counts(config: Any, batches: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
    """Picks by layer and expert, int64 [layers, experts], of transformers' own router; None without experts.

    Those of padding are not counted.
    """
    model = reference_model(config)
    counts: dict[str, Tensor] = {}

    def count(name: str, number: int, _: Any, arguments: tuple[Any, ...]) -> None:
        picks_TK = arguments[1].reshape(seen_BS.numel(), -1)
        counts[name] = counts.get(name, 0) + torch.bincount(picks_TK[seen_BS.flatten()].flatten(), minlength=number)

    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts"):
            number = module.get_parameter("down_proj").shape[0]
            module.register_forward_pre_hook(partial(count, name, number))
    with float64_reference(), torch.no_grad():
        for batch in batches:
            seen_BS = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"))
    return torch.stack(list(counts.values())) if counts else None
