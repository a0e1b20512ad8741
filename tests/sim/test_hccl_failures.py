"""The simulated HCCL by itself: what it does when ranks are late, die, disagree or give up, and what it leaves.

Catches a failure that hangs, one without its name and rank, memory or files left behind, a communicator that cannot be
made again, operations that overtake each other, and two senders that wait for each other where a card's would not.
The processes call the library without torch, so each scenario costs tenths of a second.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ascend_sim

ascend_sim.install()

from hccl_rank import BF16, CODES, FP32, FP64, INT32, MAX, PROD, SUM, end, finish, start  # noqa: E402

# A peer's death is seen within a tenth of a second; the rest is a busy machine.
SOON = 10.0


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


@pytest.fixture(autouse=True)
def nothing_named_is_left():
    before = shared_memory()
    yield
    assert not {name for name in shared_memory() - before if not name.startswith(("torch_", "sem."))}


def test_a_rank_that_never_comes_is_named_at_the_connect_timeout(tmp_path):
    here = finish(start("connecting", 4, tmp_path, ranks=[0, 3], argument=[0, 3], HCCL_CONNECT_TIMEOUT="1"))
    for result in here:
        assert result["code"] == 9 and 0.9 < result["seconds"] < SOON
        assert "EI0006" in result["text"] and "HCCL_CONNECT_TIMEOUT" in result["text"]
        assert "only 2 of 4 ranks" in result["text"] and "missing ranks: [1,2]" in result["text"]


def test_a_rank_that_cannot_be_reached_lets_all_fail_at_the_connect_timeout(tmp_path):
    fault = "hccl.connect:code=1,rank=1"
    results = finish(
        start("connecting", 2, tmp_path, argument=[0, 1], HCCL_CONNECT_TIMEOUT="1", ASCEND_SIM_FAULTS=fault)
    )
    assert [result["code"] for result in results] == [9, 9]
    assert "missing ranks: [1]" in results[0]["text"]


@pytest.mark.parametrize("how", ["die", "leave"])
def test_a_dead_peer_is_noticed_and_named(tmp_path, how):
    # Rank 1 is this process's child and stays a zombie until its output is read, after rank 0's.
    first, _ = finish(start("sums", 2, tmp_path, argument={"1": how}))
    assert first["code"] == CODES["remote"] and first["seconds"] < SOON
    assert "EI0002" in first["text"] and "remote rank: [1]: its process" in first["text"]
    assert "HcclAllReduce_group_name_0" in first["text"] and "rank[0 of 2]" in first["text"]
    # HcclGetCommAsyncError says so too, and whatever comes later fails at once, on another stream as well.
    assert first["async"] == 21 and first["async_text"] == first["text"]
    assert first["later"] == [0, CODES["remote"]]


@pytest.mark.parametrize("setting", ["environment", "communicator"])
def test_a_late_peer_is_an_exec_timeout(tmp_path, setting):
    argument = {"1": "sleep", "seconds": 4}
    if setting == "communicator":
        argument["exec_timeout_s"] = 1
    environment = {"HCCL_EXEC_TIMEOUT": "1"} if setting == "environment" else {}
    first, _ = finish(start("sums", 2, tmp_path, argument=argument, **environment))
    assert first["code"] == CODES["timeout"] and 0.9 < first["seconds"] < 3.5
    assert "EI0002" in first["text"] and "remote rank: [1] within 1 s" in first["text"]
    assert first["async"] == 9


@pytest.mark.parametrize("fault, code", [("sleep=30", "timeout"), ("kill=9", "remote")])
def test_a_peer_hangs_or_dies_at_its_third_collective(tmp_path, fault, code):
    settings = {"ASCEND_SIM_FAULTS": f"hccl.HcclAllReduce:at=3,rank=1,{fault}", "HCCL_EXEC_TIMEOUT": "3"}
    one, other = start("sums", 2, tmp_path, argument={"times": 4}, **settings)
    try:
        (first,) = finish([one])
    finally:
        end([other])
    assert first["code"] == CODES[code] and "sequence[2]" in first["text"]


def test_a_collective_fails_on_the_card_with_the_code_of_a_fault(tmp_path):
    fault = "hccl.HcclAllReduce:code=507015,at=2"
    for result in finish(start("sums", 2, tmp_path, argument={}, ASCEND_SIM_FAULTS=fault)):
        assert result["code"] == 507015 and "injected fault" in result["text"]


def call(*parts):
    return [list(parts)]


DIFFERENT = {
    "count": (call("all_reduce", 8, FP32, SUM), call("all_reduce", 9, FP32, SUM), "local[8], remote[9]"),
    "dataType": (call("all_reduce", 8, FP32, SUM), call("all_reduce", 8, INT32, SUM), "local[fp32], remote[int32]"),
    "reduceOp": (call("all_reduce", 8, FP32, SUM), call("all_reduce", 8, FP32, MAX), "local[sum], remote[max]"),
    "root": (call("broadcast", 8, FP32, 0), call("broadcast", 8, FP32, 1), "local[0], remote[1]"),
    "op": (
        call("all_reduce", 8, FP32, SUM),
        call("broadcast", 8, FP32, 0),
        "local[HcclAllReduce], remote[HcclBroadcast]",
    ),
    "empty": (call("all_reduce", 0, FP32, SUM), call("all_reduce", 9, FP32, SUM), "local[0], remote[9]"),
    "bytes from rank 0 to rank 1": (
        call("all_to_all", [1, 2], [1, 5]),
        call("all_to_all", [5, 1], [3, 1]),
        "local[8 sent], remote[12 wanted]",
    ),
    "message": (
        call("send", 8, FP32, 1),
        call("receive", 4, FP32, 0),
        "local[32 bytes of fp32], remote[16 bytes of fp32]",
    ),
}


@pytest.mark.parametrize("parameter", DIFFERENT)
def test_ranks_that_disagree_all_fail_and_name_both_sides(tmp_path, parameter):
    one, other, sides = DIFFERENT[parameter]
    first, second = (result[0] for result in finish(start("calls", 2, tmp_path, argument={"calls": [one, other]})))
    for result in (first, second):
        assert result["code"] == CODES["mismatch"] and "EI0005" in result["text"] and result["seconds"] < SOON
        assert "inconsistent between ranks" in result["text"]
    name = {"empty": "count", "message": "count"}.get(parameter, parameter)
    assert f"parameter[{name}]" in first["text"] and sides in first["text"]
    assert "local rank[0], remote rank[1]" in first["text"] and "local rank[1], remote rank[0]" in second["text"]


def test_what_hccl_does_not_take_is_refused_at_the_call(tmp_path):
    wrong = [
        ["all_reduce", 4, FP64, SUM],
        ["all_reduce", 4, BF16, PROD],
        ["all_reduce", 4, FP32, 9],
        ["broadcast", 4, 99, 0],
        ["broadcast", 4, FP32, 2],
        ["all_reduce", 4, FP32, SUM],
    ]
    for results in finish(start("calls", 2, tmp_path, argument={"calls": [wrong, wrong]})):
        assert [result["code"] for result in results] == [5, 5, 5, 1, 1, 0]
        for result, word in zip(results, ["fp64", "bfp16, prod", "fp32", "99", "[2]"], strict=False):
            assert "EI0003" in result["text"] and word in result["text"]


def test_destroying_with_work_queued_ends_the_work(tmp_path):
    first, _ = finish(start("destroying", 2, tmp_path))
    assert first["destroyed"] == 0 and first["seconds"] < SOON
    assert first["code"] == CODES["timeout"] and "destroyed" in first["text"]
    # The handle is dead afterwards.
    assert first["again"] == 2 and first["used"] == 2


def test_communicators_can_be_made_again_and_again(tmp_path):
    for result in finish(start("again", 2, tmp_path, argument=30)):
        assert result["right"]
        assert result["after"] == result["before"]


def test_a_communicator_takes_two_buffers_of_the_card(tmp_path):
    sizes = [["own", 7], ["environment", None]]
    for taken in finish(start("buffers", 2, tmp_path, argument=sizes, HCCL_BUFFSIZE="30")):
        assert taken == [[0, 14.0, ""], [0, 60.0, ""]]


def test_buffers_that_do_not_fit_the_card_are_an_error_with_their_size(tmp_path):
    settings = {"ASCEND_SIM_MEMORY_GIB": "1", "HCCL_CONNECT_TIMEOUT": "1"}
    for [[code, taken, text], [zero, _, zero_text]] in finish(
        start("buffers", 2, tmp_path, argument=[["large", 600], ["none", 0]], **settings)
    ):
        assert code == 24 and taken == 0
        assert "EI0007" in text and "2 x 600 MB" in text and "HCCL_BUFFSIZE" in text
        assert zero == 1 and "EI0003" in zero_text


def test_collectives_on_several_streams_keep_the_order_of_their_communicator(tmp_path):
    assert finish(start("streams", 4, tmp_path)) == [True] * 4


@pytest.mark.parametrize("how", ["group", "batch"])
def test_two_ranks_that_both_send_first_need_a_group(tmp_path, how):
    first, second = finish(start("grouped", 2, tmp_path, argument=how))
    assert first["code"] == second["code"] == 0
    assert (first["got"], second["got"]) == ([2.0], [1.0])


def test_two_ranks_that_both_send_first_without_a_group_wait_in_vain(tmp_path):
    for result in finish(start("grouped", 2, tmp_path, argument="alone")):
        assert result["code"] == CODES["timeout"]
        assert "HcclSend" in result["text"]


def test_communicators_of_some_ranks_come_from_the_world(tmp_path):
    groups = [[0, 2], [1, 3], [0, 2], [2, 1, 0]]
    results = finish(start("subgroups", 4, tmp_path, argument=groups))
    for rank, found in enumerate(results):
        assert found == [[0, sum(group) if rank in group else None] for group in groups]


@pytest.mark.parametrize("size", [3, 100_000])
def test_operations_with_a_size_for_each_rank(tmp_path, size):
    assert finish(start("uneven", 3, tmp_path, argument=size)) == [[True] * 4] * 3


def test_sixteen_ranks_meet(tmp_path):
    results = finish(start("sums", 16, tmp_path, argument={}))
    assert [result["code"] for result in results] == [0] * 16


def test_a_call_at_every_entry_can_be_made_to_fail(tmp_path):
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", f"{os.environ['ASCEND_SIM_LIBRARIES']}/libhccl.so"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    names = sorted(line.split()[-1] for line in symbols.splitlines() if "Hccl" in line or "Hcomm" in line)
    # These return no result.
    names = [name for name in names if name not in ("HcclGetErrorString", "HcclGetCommConfigCapability")]
    faults = ";".join(f"{name}:code=19" for name in names)
    (found,) = finish(start("entries", 1, tmp_path, argument=names, ASCEND_SIM_FAULTS=faults))
    assert len(names) > 40 and found == dict.fromkeys(names, 19)


def test_a_slow_link_takes_its_time(tmp_path):
    links = ["latency_ms=300", "latency_ms=100,mib_per_s=2"]
    for fast, late, narrow in finish(start("slow", 2, tmp_path, argument=links)):
        assert late > 0.29 and narrow > 0.59, (fast, late, narrow)


def memory_files(pids: list[int]) -> list[str]:
    """Processes that still map a communicator's memory, of these."""
    found = []
    for pid in pids:
        maps = Path(f"/proc/{pid}/maps")
        if maps.exists() and "ascend_sim_hccl" in maps.read_text():
            found.append(str(pid))
    return found


def test_killed_at_any_moment_ranks_leave_nothing_and_the_others_notice(tmp_path):
    draw = random.Random(5)
    for turn in range(6):
        folder = tmp_path / str(turn)
        folder.mkdir()
        processes = start("endless", 4, folder, HCCL_CONNECT_TIMEOUT="3")
        try:
            time.sleep(draw.uniform(0.05, 1.5))
            victims = draw.sample(processes, draw.choice([1, 3, 4]))
            for process in victims:
                process.kill()
            for process in processes:
                process.wait(timeout=60)
            assert all((process in victims) == (process.returncode == -9) for process in processes)
            assert not memory_files([process.pid for process in processes])
        finally:
            end(processes)


def test_every_symbol_that_torch_npu_looks_up_is_there():
    library = Path(sys.modules["torch_npu"].__file__ if "torch_npu" in sys.modules else _torch_npu()).parent
    text = subprocess.run(
        ["strings", str(library / "lib" / "libtorch_npu.so")], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    provided = subprocess.run(
        ["nm", "-D", "--defined-only", f"{os.environ['ASCEND_SIM_LIBRARIES']}/libhccl.so"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    wanted = {line for line in text if line in LOOKED_UP}
    assert wanted == LOOKED_UP, "the release looks up other names than this test was written for"
    assert not {name for name in wanted if f" {name}\n" not in provided}


def _torch_npu() -> str:
    from ascend_sim import build

    return str(build.package("torch_npu") / "__init__.py")


# The names that torch_npu 2.13 registers for libhccl and libhcomm (TORCH_NPU_REGISTER_FUNCTION in its headers).
LOOKED_UP = set(
    "HcclAlltoAllV HcclAlltoAllVC HcclReduce HcclGetCommAsyncError HcclScatter HcclBatchSendRecv HcclAlltoAll "
    "HcclAllGatherV HcclReduceScatterV HcclCommInitRootInfoConfig HcclCommInitRootInfoScalable "
    "HcclGetCommConfigCapability HcclCommInitClusterInfoConfig HcclCreateSubCommConfig HcclCommWorkingDevNicSet "
    "HcclCommRegister HcclCommDeregister HcclCommExchangeMem HcclCommSymWinRegister HcclCommSymWinDeregister "
    "HcclGetRootInfo HcclGetRootInfoScalable HcclCommDestroy HcclSend HcclRecv HcclAllReduce HcclBroadcast "
    "HcclAllGather HcclReduceScatter HcclCommInitAll HcclCommInitRootInfo HcclGroupStart HcclGroupEnd HcommMemAlloc "
    "HcommMemFree HcclSetConfig HcclGetCommName HcclCommResume HcclCommSetMemoryRange HcclCommUnsetMemoryRange "
    "HcclCommActivateCommMemory HcclCommDeactivateCommMemory".split()
)
