"""Injected faults: what fails, at which call, in which process, and how torch_npu then words it.

Catches a fault that strikes the wrong call, outlives its block or does not reach a child, and a name that no call has.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from ascend_sim import faults, inject

STARTED = "import torch, torch_npu; x = torch.ones(4, device='npu'); "


def child(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", STARTED + program],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_call_fails_with_the_code_at_its_nth_call_and_only_then() -> None:
    with inject("aclrtSynchronizeDeviceWithTimeout", code=507011, at=2):
        torch.npu.synchronize()
        with pytest.raises(RuntimeError, match="507011"):
            torch.npu.synchronize()
        torch.npu.synchronize()
    torch.npu.synchronize()


def test_the_text_of_a_fault_reaches_the_error() -> None:
    with (
        inject("aclrtSynchronizeDeviceWithTimeout", code=507018, text="EZ0001: the card is tired"),
        pytest.raises(RuntimeError, match="the card is tired"),
    ):
        torch.npu.synchronize()


def test_an_operator_that_fails_while_it_runs_is_told_by_the_next_call_that_waits() -> None:
    # A failed stream stays so; the process is one of its own.
    program = """
import ascend_sim
with ascend_sim.inject("stream", code=507015, text="EZ9999: the core has stopped"):
    y = x + 1
try:
    torch.npu.current_stream().synchronize()
except RuntimeError as error:
    print("told" if "507015" in str(error) and "the core has stopped" in str(error) else error)
"""
    done = child(program)
    assert done.stdout.splitlines()[-1] == "told", done.stdout + done.stderr


def test_memory_ends_at_an_allocation_of_a_size() -> None:
    torch.npu.empty_cache()
    with inject("aclrtMallocAlign32", code=207001, bytes=1 << 30, times=0):
        torch.empty(1 << 20, dtype=torch.uint8, device="npu")
        with pytest.raises(RuntimeError, match="NPU out of memory"):
            torch.empty(1 << 30, dtype=torch.uint8, device="npu")
    torch.empty(1 << 30, dtype=torch.uint8, device="npu")
    torch.npu.empty_cache()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("aten::nonzero", lambda x: x.nonzero()),
        ("aten::add", lambda x: x + x),
        ("npu::npu_swiglu", lambda x: torch.ops.npu.npu_swiglu(x)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refused_operator_fails_in_the_words_of_torch_npu(name: str, call) -> None:
    x = torch.ones(2, 4, device="npu")
    with inject(name), pytest.raises(RuntimeError, match="error code is 500002") as caught:
        call(x)
    assert "ERR01100 OPS call acl api failed" in str(caught.value)
    assert f"OPS function error: {name.partition('::')[2]}" in str(caught.value)
    call(x)


def test_a_failed_copy_fails_the_copy() -> None:
    x = torch.ones(4, device="npu")
    with inject("aclrtMemcpy", code=507899), pytest.raises(RuntimeError, match="507899"):
        x.cpu()
    assert x.cpu().sum() == 4


def test_a_fault_of_the_environment_strikes_only_its_rank_and_may_end_the_process() -> None:
    fault = {"ASCEND_SIM_FAULTS": "aclrtSynchronizeDeviceWithTimeout:exit=9,rank=1"}
    program = "torch.npu.synchronize(); print('through')"
    other, struck = child(program, RANK="0", **fault), child(program, RANK="1", **fault)
    assert other.returncode == 0 and "through" in other.stdout, other.stderr
    assert struck.returncode == 9 and "through" not in struck.stdout


def test_a_child_that_is_started_in_the_block_has_the_fault() -> None:
    with inject("aclrtSynchronizeDeviceWithTimeout", code=507011):
        ended = child("torch.npu.synchronize()")
    assert ended.returncode == 1 and "507011" in ended.stderr
    assert faults.VARIABLE not in os.environ


def test_a_slow_call_is_slow() -> None:
    begin, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    begin.record()
    with inject("aclrtSynchronizeDeviceWithTimeout", sleep=0.2):
        torch.npu.synchronize()
    end.record()
    end.synchronize()
    assert begin.elapsed_time(end) >= 200


@pytest.mark.parametrize(
    ("name", "near"),
    [("aclrtMalocHost", "aclrtMallocHost"), ("HcclAllreduce", "HcclAllReduce"), ("aten::nonzro", "aten::nonzero")],
)
def test_a_name_that_no_call_has_is_refused_with_near_ones(name: str, near: str) -> None:
    with pytest.raises(faults.UnknownCall, match=near):
        faults.spell(name, code=1)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"cod": 1}, "no option 'cod'"), ({}, "does nothing"), ({"code": 1, "text": "a;b"}, "without")],
)
def test_an_option_that_makes_no_sense_is_refused(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        faults.spell("aclrtFree", **options)


def test_a_wrong_name_in_the_environment_ends_the_run_before_it_starts() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "ascend_sim", "run", "--fault", "aclrtFre:code=1", "-c", "print('ran')"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2 and "aclrtFree" in ended.stderr and "ran" not in ended.stdout


def test_errors_are_logged_where_asked_for_as_cann_does(tmp_path) -> None:
    program = """
import ascend_sim
try:
    with ascend_sim.inject("aclrtSynchronizeDeviceWithTimeout", code=507018, text="EI0004: a torn table"):
        torch.npu.synchronize()
except RuntimeError:
    pass
"""
    folder = tmp_path / "logs"
    assert child(program, ASCEND_PROCESS_LOG_PATH=str(folder)).returncode == 0
    (log,) = folder.glob("debug/plog/plog-*_*.log")
    assert re.search(
        r"^\[ERROR\] HCCL\(\d+,python\):[\d:.-]+ \[ascend_sim\]EI0004: a torn table$", log.read_text(), re.M
    )

    done = child(program, HOME=str(tmp_path / "home"))
    assert done.returncode == 0 and "torn" not in done.stdout + done.stderr and not (tmp_path / "home").exists()

    done = child(program, ASCEND_SLOG_PRINT_TO_STDOUT="1", ASCEND_GLOBAL_LOG_LEVEL="1")
    assert "a torn table" in done.stdout
    # torch_npu's own lines, with file and function in their places.
    assert re.search(r"^\[INFO\] APP\(\d+,python\):.* \[NPUQueue.cpp:\d+\]\[MakeSureQueueEmpty\]", done.stdout, re.M)
