"""Catches bytes that are moved twice: a collective issued once per use instead of once per region, a gather of what
was whole already, an exchange of all rows where some would do, a layer gathered three times.

The collectives that a step really issues are held against the arithmetic minimum of the layout.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from least_traffic import least_traffic
from torch.distributed.tensor import DTensor, Partial, Shard

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.models.moe.block import MoEBlock
from lightning_npu_tp.parallel.clipping import clip_grad_norm_
from lightning_npu_tp.parallel.layout import DATA_AXIS, EXPERT_AXIS, TENSOR_AXIS, Layout, Meshes, resolve_dispatch
from lightning_npu_tp.parallel.plan import chunk_bounds
from lightning_npu_tp.parallel.sequence import all_gather_first_dim
from lightning_npu_tp.tools.prove import plan_of
from lightning_npu_tp.tools.testing.models import random_batch, tiny_deepseek_v2_config
from lightning_npu_tp.tools.testing.sharded import sharded_model
from lightning_npu_tp.tools.testing.traffic import CountTraffic

# DeepSeek-V2-Lite with an eighth of its widths, half of its experts, and one layer of each kind.
CONFIG = tiny_deepseek_v2_config(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=1368,
    num_attention_heads=16,
    num_key_value_heads=16,
    num_hidden_layers=2,
    kv_lora_rank=64,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=32,
    num_experts_per_tok=6,
    moe_intermediate_size=176,
)
SEQUENCES, LENGTH = 2, 128
LAYOUTS = [(1, 2, 2), (1, 4, 4), (2, 1, 2), (4, 1, 4), (4, 1, 2), (2, 2, 2), (2, 2, 4)]
LIMIT = 1.05


def count_step(rank: int, world_size: int, config: Any, layout: Layout, options: Options) -> tuple[dict, int]:
    """Bytes that this rank sends in a training step by axis and operation, and its rows that leave, all layers."""
    model, meshes = sharded_model(config, layout, options)
    rows_away = 0

    def count_rows(block: MoEBlock, arguments: Any, routing: Any) -> None:
        nonlocal rows_away
        experts_TK = routing.experts_TK
        if layout.tensor > 1 and not options.sequence_parallel:
            first, last = chunk_bounds(len(experts_TK), rank % layout.tensor, layout.tensor)
            experts_TK = experts_TK[first:last]
        owner_TK = experts_TK // (config.n_routed_experts // layout.expert)
        rows_away += int((owner_TK != rank % layout.expert).sum())

    for block in model.modules():
        if isinstance(block, MoEBlock):
            block.gate.register_forward_hook(count_rows)
    batch = random_batch(config, SEQUENCES, LENGTH, seed=rank // layout.tensor)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    with CountTraffic(meshes) as traffic:
        model(**batch).loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return dict(traffic.sent), rows_away


def issue_known(rank: int, world_size: int) -> dict[tuple[str, str], float]:
    """One collective of each kind over four ranks in two tensor groups, with sizes that are easy to reckon."""
    meshes = Meshes.build(Layout(2, 2, 4), "cpu")
    ten = torch.zeros(10)
    # torch 2.13 renamed it.
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    with CountTraffic(meshes) as traffic:
        dist.all_reduce(ten, group=meshes.tensor_group)
        dist.all_gather([torch.zeros(10), torch.zeros(10)], ten, group=meshes.data_group)
        all_gather_first_dim(ten, meshes.data_group)
        reduce_scatter(torch.zeros(10), torch.zeros(40))
        dist.broadcast(ten, src=0)
        send = [0, 1, 2, 3]
        dist.all_to_all_single(torch.zeros(4 * rank, 5), torch.zeros(6, 5), [rank] * 4, send, group=meshes.expert_group)
        dist.all_to_all_single(torch.zeros(8), torch.zeros(8), group=meshes.expert_group)
        DTensor.from_local(ten, meshes.dense[TENSOR_AXIS], (Shard(0),), run_check=False).full_tensor()
        DTensor.from_local(ten, meshes.dense[TENSOR_AXIS], (Partial(),), run_check=False).redistribute(
            placements=(Shard(0),)
        )
        dist.barrier()
    return traffic.sent


def test_each_kind_of_collective_is_reckoned_by_its_optimal_algorithm(on_ranks: Any) -> None:
    for rank, sent in enumerate(on_ranks(issue_known, 4)):
        world = EXPERT_AXIS if ("world", "broadcast") not in sent else "world"
        assert sent == {
            (TENSOR_AXIS, "all_reduce"): 40.0,
            (DATA_AXIS, "all_gather"): 40.0 + 40.0,
            (world, "reduce_scatter"): 3 * 40.0,
            (world, "broadcast"): 30.0,
            (EXPERT_AXIS, "all_to_all"): (6 - rank) * 5 * 4.0 + 3 * 2 * 4.0,
            (TENSOR_AXIS, "all_gather"): 40.0,
            (TENSOR_AXIS, "reduce_scatter"): 20.0,
        }


CASES = [(sizes, sliced) for sizes in LAYOUTS for sliced in (False, True) if sizes[1] > 1 or not sliced]


@pytest.mark.parametrize("sizes, sliced", CASES)
def test_a_step_moves_hardly_more_than_its_layout_must(on_ranks: Any, sizes: Any, sliced: bool) -> None:
    layout, options = Layout(*sizes), Options(sequence_parallel=sliced)
    results = on_ranks(count_step, layout.world, CONFIG, layout, options, timeout=120)
    exchanges = resolve_dispatch(layout, options.dispatch) == "all_to_all"
    plan, num_moe = plan_of(CONFIG), CONFIG.num_hidden_layers - CONFIG.first_k_dense_replace
    least = least_traffic(
        CONFIG,
        plan.shapes,
        plan.rules,
        layout,
        tokens=SEQUENCES * LENGTH,
        rows_away=sum(rows for _, rows in results) / layout.world / num_moe if exchanges else 0.0,
        # The ranks compute in float64.
        element_bytes=8,
        sliced=sliced,
    )
    sent: dict[str, float] = {}
    for counted, _ in results:
        for (axis, _), number in counted.items():
            sent[axis] = sent.get(axis, 0.0) + number / layout.world
    ratio = sum(sent.values()) / sum(least.values())
    by_axis = {axis: f"{sent.get(axis, 0) / 1e6:.3f} of {number / 1e6:.3f}" for axis, number in least.items()}
    print(f"{sizes} {'slices' if sliced else 'whole'}: {ratio:.4f} of the minimum; MB sent of least: {by_axis}")
    assert ratio <= LIMIT, f"{sent} against {least}: {results[0][0]}"
    # Nobody moves less than the least: then the arithmetic would be wrong.
    assert ratio >= 1
