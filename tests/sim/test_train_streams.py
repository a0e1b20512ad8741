"""Waits: each one of ours, left out, is noticed on simulated cards, whose streams and links really run beside the host.

Catches a wait that is missing (rows read before they have come, forward or backward), and a test that would not see
it: the wait is taken out here and the same exchange must then fail. The link is slow, so that chance helps nobody.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_npu_tp.devices.device import backend_for, torch_module
from lightning_npu_tp.parallel import collectives
from lightning_npu_tp.tools.testing.ranks import run_ranks

RANKS = 2
WAYS = ("none", "forward", "backward")


def exchange(rank: int, world_size: int) -> dict[str, str]:
    """What is wrong with an exchange and its gradient, with all waits and without the one of either pass."""
    module: Any = torch_module("npu")
    module.set_device(rank)
    dist.init_process_group(backend_for("npu"), rank=rank, world_size=world_size, device_id=torch.device("npu", rank))
    group = dist.group.WORLD
    finish, found = collectives._Transfer.finish, {}
    for left_out in WAYS:
        calls = []

        def without(
            self: Any, left_out: str = left_out, calls: list[str] = calls, finish: Any = finish
        ) -> torch.Tensor:
            calls.append("forward" if not calls else "backward")
            if calls[-1] != left_out:
                return finish(self)
            work, _, received = self._under_way
            self._under_way = None
            kept.append(work)
            return received

        kept: list[Any] = []
        collectives._Transfer.finish = without  # type: ignore[method-assign]
        send = [300 + rank, 200]
        receive = [300, 301] if rank == 0 else [200, 200]
        rows = torch.full((sum(send), 64), float(rank + 1), device="npu", requires_grad=True)
        try:
            got = collectives.start_exchange(rows, send, receive, group).wait()
            values = (got * 2.0).detach().cpu()
            scale = torch.arange(1.0, len(got) + 1, device="npu")[:, None]
            (got * scale).sum().backward()
            gradient = rows.grad.cpu()
            wanted = torch.cat([torch.full((count, 64), 2.0 * (other + 1)) for other, count in enumerate(receive)])
            # The rows that this rank sent lie behind one another at their destinations, after rank 0's.
            starts = [0 if rank == 0 else 300, 0 if rank == 0 else 200]
            numbers = torch.cat([torch.arange(1.0, n + 1) + start for n, start in zip(send, starts, strict=True)])
            right = torch.equal(values, wanted), torch.equal(gradient, numbers[:, None].expand(-1, 64))
            found[left_out] = "" if all(right) else f"stale data: forward, backward right: {right}"
        except RuntimeError as error:
            found[left_out] = f"{type(error).__name__}: {error}"
        finally:
            collectives._Transfer.finish = finish  # type: ignore[method-assign]
        for work in kept:
            work.wait()
        module.synchronize()
        dist.barrier()
    return found


@pytest.mark.timeout(180)
def test_an_exchange_is_right_over_a_slow_link_and_wrong_without_either_of_its_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ASCEND_SIM_DELAY_US", "30000")
    # Stale data must show by itself; the checker of streams would raise before it is read.
    monkeypatch.setenv("ASCEND_SIM_CHECK_STREAMS", "0")
    for found in run_ranks(exchange, RANKS, timeout=120, backend=None):
        assert found["none"] == ""
        assert found["forward"] and found["backward"], found
