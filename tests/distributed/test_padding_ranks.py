"""Padding counts in no balance loss, no expert's picks and so in no bias and no picture, whoever says what it is.

Catches experts that are balanced by padding, which is most of a batch where short samples are not packed: each row of a
padded batch is held against the same row without padding, in one process.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.models.families.registry import FAMILIES
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.tools.testing.models import tiny_config
from lightning_npu_tp.tools.testing.reference import assert_close_relative
from lightning_npu_tp.tools.testing.sharded import moe_blocks, sharded_model, whole

LENGTHS, SIZE, PAD = (12, 7, 3, 9), 12, 5
MIXTURES = [family.name for family in FAMILIES if family.experts]
LAYOUTS = {
    "tensor 2": ((1, 2, 2), Options()),
    "tensor 2, slices": ((1, 2, 2), Options(sequence_parallel=True, recompute="block")),
    "tensor 2, slices sent": ((1, 2, 2), Options(sequence_parallel=True, dispatch="all_to_all")),
    "data 2 shard": ((2, 1, 1), Options()),
    "data 2 replicate": ((2, 1, 1), Options(data_parallel="replicate")),
    "data 2, tensor 2, expert 4": ((2, 2, 4), Options(sequence_parallel=True)),
}


def rows() -> Tensor:
    return torch.randint(6, 128, (len(LENGTHS), SIZE), generator=torch.Generator().manual_seed(1))


def padded() -> dict[str, dict[str, Tensor]]:
    """The rows as long as LENGTHS says, in every way to say what is padding; a 4-D mask that says nothing, too."""
    ends = torch.tensor(LENGTHS)[:, None]
    place = torch.arange(SIZE)[None]
    mask = place < ends
    right = torch.where(mask, rows(), PAD)
    left = torch.stack([row.roll(SIZE - length) for row, length in zip(right, LENGTHS, strict=True)])
    # As data=chat gives them: padding is one more document.
    positions = torch.where(mask, place, place - ends)
    causal = torch.ones(SIZE, SIZE, dtype=torch.bool).tril().expand(len(LENGTHS), 1, -1, -1)
    return {
        "right": {"input_ids": right, "attention_mask": mask.long()},
        "left": {"input_ids": left, "attention_mask": mask.flip(1).float()},
        "documents": {"input_ids": right, "position_ids": positions, "token_mask": mask},
        "4-D mask": {"input_ids": right, "attention_mask": causal, "token_mask": mask.int()},
    }


def answer(model: Any, batch: dict[str, Tensor], layout: Layout, group: Any = None) -> dict[str, Tensor]:
    """Balance loss, picks by layer and expert, and the routers' gradient, of all data ranks together."""
    blocks = moe_blocks(model)
    rank, per_rank = dist.get_rank() // layout.tensor, len(batch["input_ids"]) // layout.data
    mine = {name: value[rank * per_rank : (rank + 1) * per_rank] for name, value in batch.items()}
    for block in blocks:
        block.pending_tokens_per_expert = None
    model.zero_grad()
    output = model.train()(**mine, labels=mine["input_ids"])
    # Of the loss nothing but that the graph is whole, which FSDP wants.
    (output.aux_loss + 0 * output.loss).backward()
    found = {"aux": output.aux_loss.detach().clone()}
    for name in ("tokens_per_expert", "pending_tokens_per_expert"):
        found[name] = torch.stack([getattr(block, name) for block in blocks])
        dist.all_reduce(found[name])
    if layout.data > 1:
        dist.all_reduce(found["aux"], group=group)
        found["aux"] /= layout.data
    gates = [block.gate.weight.grad for block in blocks]
    found["gates"] = torch.stack([whole(grad).clone() for grad in gates])
    return found


def config(family: str) -> Any:
    return tiny_config(family, aux_loss_alpha=0.05)


def alone(rank: int, world_size: int, family: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """What the rows without padding come to, and each kind of padded batch."""
    layout = Layout(1, 1, 1)
    model, _ = sharded_model(config(family), layout)
    each = [answer(model, {"input_ids": row[None, :n]}, layout) for row, n in zip(rows(), LENGTHS, strict=True)]
    stacks = {name: torch.stack([one[name] for one in each]) for name in each[0]}
    expected = {name: values.sum(0) if "tokens" in name else values.mean(0) for name, values in stacks.items()}
    return expected, {kind: answer(model, batch, layout) for kind, batch in padded().items()}


def sharded(rank: int, world_size: int, sizes: tuple[int, ...], options: Options) -> dict[str, dict[str, Tensor]]:
    layout = Layout(*sizes)
    model, meshes = sharded_model(config("deepseek_v2"), layout, options)
    return {kind: answer(model, batch, layout, meshes.data_group) for kind, batch in padded().items()}


def assert_equal(found: dict[str, dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    picks = sum(LENGTHS) * 2
    for kind, values in found.items():
        for name in ("tokens_per_expert", "pending_tokens_per_expert"):
            assert torch.equal(values[name], expected[name]), (kind, name)
        for name in ("aux", "gates"):
            assert_close_relative(values[name], expected[name], 1e-10, f"{name}, {kind}")
    assert set(expected["tokens_per_expert"].sum(1).tolist()) <= {picks, 2 * picks}, "two or four experts a token"


@pytest.mark.parametrize("family", MIXTURES)
def test_padding_counts_nowhere_in_any_family(on_ranks: Any, family: str) -> None:
    ((expected, found),) = on_ranks(alone, 1, family)
    assert_equal(found, expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_padding_counts_nowhere_in_any_layout(on_ranks: Any, name: str) -> None:
    sizes, options = LAYOUTS[name]
    ((expected, _),) = on_ranks(alone, 1, "deepseek_v2")
    for found in on_ranks(sharded, sizes[0] * sizes[1], sizes, options):
        assert_equal(found, expected)


def generate(rank: int, world_size: int) -> list[int]:
    """A cache makes attention_mask longer than the tokens; and what is refused."""
    model, _ = sharded_model(config("deepseek_v2"), Layout(1, 1, 1))
    ids, mask = padded()["left"]["input_ids"][:2], padded()["left"]["attention_mask"][:2].long()
    seen = []
    moe_blocks(model)[0].register_forward_hook(lambda block, *_: seen.append(int(block.tokens_per_expert.sum())))
    model.eval().generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=3, use_cache=True)
    with pytest.raises(ConfigError, match=r"token_mask has the shape \(2, 11\), but there are \(2, 12\) tokens"):
        model(input_ids=ids, token_mask=mask[:, 1:])
    return seen


def test_generated_tokens_count_whatever_the_prompts_mask_is(on_ranks: Any) -> None:
    assert on_ranks(generate, 1) == [[2 * (12 + 7), 2 * 2, 2 * 2]]
