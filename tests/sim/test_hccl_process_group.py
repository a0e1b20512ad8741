"""A training process on the simulated card when a peer fails: the real ProcessGroupHCCL and its watchdog end it.

Catches a failure that reaches torch_npu without its text or not at all, so that a run would hang or name nothing.
The processes import torch_npu afresh, because they do not survive.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import ascend_sim
from lightning_npu_tp.tools.testing.ranks import free_port

ascend_sim.install()

# Two imports of torch_npu at once on a busy machine, then a second for each of the failures.
ENDED = 150.0

SCRIPT = """
import sys, torch, torch_npu, torch.distributed as dist
rank = int(sys.argv[1])
torch.npu.set_device(rank)
dist.init_process_group("cpu:gloo,npu:hccl", init_method=sys.argv[2], rank=rank, world_size=2)
x = torch.ones(4, device="npu")
for step in range(5):
    dist.all_reduce(x)
    torch.npu.synchronize()
    print("step", step, flush=True)
"""


@pytest.mark.parametrize(
    "fault, text", [("kill=9", "remote rank: [1]: its process"), ("sleep=300", "remote rank: [1] within 3 s")]
)
def test_a_run_ends_with_a_telling_text_when_its_peer_is_lost(tmp_path, fault, text):
    environment = {
        **os.environ,
        "ASCEND_SIM_FAULTS": f"hccl.HcclAllReduce:at=3,rank=1,{fault}",
        "HCCL_EXEC_TIMEOUT": "3",
    }
    address = f"tcp://127.0.0.1:{free_port()}"
    processes, logs = [], [tmp_path / f"{rank}.txt" for rank in range(2)]
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as file:
                command = [sys.executable, "-c", SCRIPT, str(rank), address]
                settings = {**environment, "RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=settings, stdout=file, stderr=subprocess.STDOUT))
        assert processes[0].wait(timeout=ENDED) != 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
    told = logs[0].read_text()
    assert "step 1" in told and "step 2" not in told, told
    assert "EI0002" in told and text in told, told


def come_alone(rank: int, world: int) -> str:
    import torch_npu  # noqa: F401

    torch.npu.set_device(rank)
    text = ""
    group = dist.new_group([0, 1], backend="cpu:gloo,npu:hccl", timeout=timedelta(seconds=30))
    os.environ["HCCL_CONNECT_TIMEOUT"] = "1"
    if rank == 0:
        begin = time.monotonic()
        with pytest.raises(RuntimeError) as failure:
            dist.all_reduce(torch.ones(4, device="npu"), group=group)
        assert time.monotonic() - begin < 20
        text = str(failure.value)
    dist.barrier(group=dist.new_group([0, 1], backend="gloo"))
    return text


@pytest.mark.filterwarnings("ignore")
def test_a_rank_that_comes_alone_is_told_who_is_missing(on_ranks):
    text, _ = on_ranks(come_alone, 2, backend="cpu:gloo,npu:hccl", timeout=60)
    assert "hcclCommInitRootInfoConfig" in text and "error code is 9" in text
    assert "EI0006" in text and "only 1 of 2 ranks" in text and "missing ranks: [1]" in text
