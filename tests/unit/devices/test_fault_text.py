"""Error codes. Catches: a code that is not found in the form in which torch_npu, HCCL or CANN wrap it, a size taken for
a code, a setting in a remedy that does not exist, an unknown error changed, a page of remedies that is out of date.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from lightning_npu_tp import NPUTensorParallelStrategy
from lightning_npu_tp.devices.fault_table import ERR_KINDS, ERR_MODULES, FAULTS
from lightning_npu_tp.devices.fault_text import (
    called,
    find_fault,
    is_communication,
    may_be_lost_peer,
    mentioned,
    reads_like_lost_peer,
    troubleshooting,
)
from lightning_npu_tp.devices.hccl_settings import HcclSettings
from lightning_npu_tp.errors import CheckpointError
from lit_models.data import TextDataModule

ROOT = Path(__file__).parents[3]

STAMP = "[ERROR] 2026-11-01-10:45:23 (PID:13075, Device:0, RankID:3)"
# Whole texts as torch_npu raises them, and the fault that explains them best.
REAL = {
    "connect": (
        "create_config:build/CMakeFiles/torch_npu.dir/compiler_depend.ts:102 HCCL function error: "
        "hcclCommInitRootInfoConfig(numRanks, &rootInfo, rank, config, &(comm->hcclComm_)), error code is 4\n"
        f"{STAMP} ERR02200 DIST call hccl api failed.\n"
        "[PID: 749] 2026-11-01-10:45:23.787.356 Get_Socket_Timeout(EI0006): Getting socket times out. Reason: 1. The "
        "remote does not initiate a connect request.\n        Solution: 1. Check the rank service processes",
        "EI0006",
        "hcclCommInitRootInfoConfig",
    ),
    "exec": (
        "npuSynchronizeDevice:build/CMakeFiles/torch_npu.dir/compiler_depend.ts:479 NPU function error: "
        f"AclrtSynchronizeDeviceWithTimeout, error code is 507048\n{STAMP} ERR00100 PTA call acl api failed\n"
        "[Error]: The execution of the internal task times out. \n"
        "EI0002: [PID: 13075] 2026-11-01-10:45:23.586.187 The wait execution of the Notify register times out. Reason: "
        "The Notify register has not received the Notify record from remote rank: [unknown]. base information: "
        "[streamID:[1], taskID[8318285], tag[AllReduce_group_name_710]",
        "EI0002",
        "AclrtSynchronizeDeviceWithTimeout",
    ),
    "task": (
        f"operator():NPUStream.cpp:506 NPU function error: aclrtSynchronizeStream, error code is 107020\n{STAMP} "
        "ERR00100 PTA call acl api failed",
        "107020",
        "aclrtSynchronizeStream",
    ),
    "last process": (
        f"[ERROR] HCCL error in: torch_npu/csrc/distributed/ProcessGroupHCCL.cpp:64\n{STAMP} ERR02200 DIST call "
        "hccl api failed.\nEJ0001: 2026-11-01-11:57:54.167.645 Failed to initialize the HCCP process. Reason: Maybe "
        "the last training process is running.",
        "EJ0001",
        None,
    ),
    "vector core": (
        "operator():build/CMakeFiles/torch_npu.dir/compiler_depend.ts:25 NPU function error: "
        "c10_npu::acl::AclrtSynchronizeStreamWithTimeout(copy_stream), error code is 507035\n"
        f"{STAMP} ERR00100 PTA call acl api failed\n[Error]: The vector core execution is abnormal.",
        "507035",
        "AclrtSynchronizeStreamWithTimeout",
    ),
    "aicpu": (
        "NPU function error: call aclnnRepeatInterleaveIntWithDim failed, error code is 507018\n"
        "AclNN_Runtime_Error(EZ9903): aclrtLaunchKernelWithHostArgs failed, return: 507018",
        "507018",
        "aclnnRepeatInterleaveIntWithDim",
    ),
    "suspect": (
        f"NPU function error: SUSPECT REMOTE ERROR, error code is 507057\n{STAMP} ERR00100 PTA call acl api failed.",
        "507057",
        None,
    ),
    "dead peer": (
        "npuSynchronizeDevice:../torch_npu/csrc/core/npu/NPUStream.cpp:737 NPU function error: SUSPECT REMOTE ERROR, "
        f"error code is 507057\n{STAMP} ERR00100 PTA call acl api failed.\nEI0005: x",
        "507057",
        None,
    ),
    "refused": (
        "operator():../torch_npu/csrc/framework/OpParamMaker.cpp:364 OPS function error: NonZero, error code is "
        f"500002\n{STAMP} ERR01100 OPS call acl api failed\n[Error]: A GE error occurs in the system.",
        "500002",
        "NonZero",
    ),
    "compile": (
        "Run:torch_npu/csrc/framework/OpParamMaker.cpp:128 NPU error,NPU error code is:500002\n"
        "[PID: 1876100] Failure_to_Compile_Op(E40021): Failed to compile Op [trans_Cast_2,].",
        "500002",
        None,
    ),
    "argument": (
        "NPU function error: call aclnnGroupedMatmulV4 failed, error code is 161002\n"
        "EZ1001: [PID: 1] groupListOptional should be int64",
        "EZ1001",
        "aclnnGroupedMatmulV4",
    ),
    "memory": (
        "NPU out of memory. Tried to allocate 260.00 MiB (NPU 0; 28.50 GiB total capacity; 10.24 GiB already "
        f"allocated; 10.24 GiB current active; 149.57 MiB free; 10.28 GiB reserved in total by PyTorch)\n{STAMP} "
        "ERR00006 PTA memory error",
        "out of memory",
        None,
    ),
    "cuda memory": (
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.33 GiB of which 10.50 GiB "
        "is free.",
        "out of memory",
        None,
    ),
    "pinned": ("Malloc pin memory failed, host out of memory, Rried to allocate size: 12", "host out of memory", None),
    "driver memory": ("aclrtMalloc failed, runtime result = 207018.[FUNC:ReportCallError]", "207018", None),
    "watchdog": (
        "[Rank 1] Watchdog caught collective operation timeout: WorkHCCL(SeqNum=7, OpType=ALLREDUCE)",
        "watchdog",
        None,
    ),
    "nccl": ("NCCL error in: ProcessGroupNCCL.cpp:3700, ncclRemoteError: remote process exited", "NCCL", None),
    "pipe": ("BrokenPipeError: [Errno 32] Broken pipe", "BrokenPipe", None),
    "launch queue": (
        "The Inner error is reported as above. The process exits for this inner error, and the current working "
        f"operator name is HcclAllreduce.\n{STAMP} ERR00100 PTA call acl api failed.\nEI0004: [PID: 1] a torn table",
        "EI0004",
        "HcclAllreduce",
    ),
    "launch queue without an error": ("torch_npu's launch queue has ended, and", "launch queue", None),
    "only its own code": (f"something failed\n{STAMP} ERR01007 OPS feature not supported", "ERR01007", None),
}


@pytest.mark.parametrize("name", REAL)
def test_real_texts_are_found_and_the_most_telling_code_wins(name: str) -> None:
    text, code, function = REAL[name]
    fault = find_fault(text)
    assert fault is not None and fault.code == code
    assert called(text) == function


# Every code of the reference: the table must not lose one.
CODES = (
    "107002 107003 107019 107020 207001 207018 500001 500002 507011 507014 507015 507018 507035 507046 507048 507053 "
    "507054 507056 507057 EI0001 EI0002 EI0003 EI0004 EI0005 EI0006 EI0007 EI0008 EI0011 EI0012 EI0013 EI0015 EI0019 "
    "EJ0001 EZ1001"
).split()
WRAPPED = (
    "{}: it happened",
    "Some_Name({}): it happened",
    "[PID: 12] 2026-01-01 {}: it happened",
)
NUMBERED = (
    "NPU function error: f, error code is {}",
    "NPU error,NPU error code is:{}",
    "device fault, runtime result = {}.[FUNC:f]",
    "execute failed, return: {}",
    "NPU warning, error code is {}[Error]: ",
    "ret[{}]",
)


@pytest.mark.parametrize("code", CODES)
def test_every_code_is_found_however_it_is_wrapped(code: str) -> None:
    for form in NUMBERED if code.isdigit() else WRAPPED:
        fault = find_fault(form.format(code))
        assert fault is not None and fault.code == code, form
        text = fault.sentence()
        assert fault.cause in text and f"Check: {fault.check}" in text and f"Starting again {fault.restart}." in text


def test_torch_npus_own_codes_are_read_by_module_and_kind() -> None:
    for module in ERR_MODULES:
        for kind in ERR_KINDS:
            fault = find_fault(f"x\n{STAMP} ERR{module}{kind} X y")
            assert fault is not None and fault.code == f"ERR{module}{kind}"
            assert ERR_MODULES[module] in fault.title and ERR_KINDS[kind] in fault.title
    assert "reference" in find_fault("ERR01007").change
    assert find_fault("ERR02011").lost_peer and not find_fault("ERR00011").lost_peer
    assert find_fault("ERR77007") is None and find_fault("ERR00777") is None


def test_what_is_no_error_code_is_left_alone() -> None:
    for text in (
        "",
        "The size of tensor a (107020) must match the size of tensor b (500002)",
        "index 507015 is out of bounds",
        "error code is 1070201",
        "error code is 999999",
        "EI99991 EI000 FEI0006",
        "result = 42",
        "shape '[2, 207018]' is invalid",
        "ran out of luck and memory",
    ):
        assert find_fault(text) is None, text


def test_all_codes_of_a_text_are_told_in_order() -> None:
    assert [fault.code for fault in mentioned(REAL["exec"][0])] == ["EI0002", "507048", "ERR00100"]


def test_waiting_for_another_rank_is_told_from_a_fault_of_this_one() -> None:
    lost = {fault.code for fault in FAULTS if fault.lost_peer}
    assert {"107019", "107020", "507046", "507048", "507057", "EI0002", "EI0006", "watchdog"} <= lost
    assert not lost & {"out of memory", "207018", "500002", "507015", "EI0003", "EI0005", "EZ1001"}
    assert is_communication(find_fault("EI0005: x")) and not is_communication(find_fault("ret = 507015"))


LOST_PEER = (
    "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:47",
    "RuntimeError: Application timeout caused pair closure",
    "RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation to complete",
    "RuntimeError: Gloo connectFullMesh failed with Connect timeout [127.0.0.1]:1",
    "torch.distributed.DistNetworkError: failed to recv, got 0 bytes",
    "torch.distributed.DistStoreError: wait timeout after 6000ms, keys: /x",
    "torch.distributed.DistBackendError: x",
    "DistError: x",
    "RuntimeError: HCCL error in: x",
    "RuntimeError: Socket Timeout",
    "RuntimeError: The client socket has timed out after 300000ms while trying to connect to (node-a, 29500).",
    "RuntimeError: Timed out after 31 seconds waiting for clients. 1/2 clients joined.",
    "RuntimeError: [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)",
    "ConnectionResetError: [Errno 104] Connection reset by peer",
    "BrokenPipeError: [Errno 32] Broken pipe",
    "RuntimeError: error code is 507048",
    "RuntimeError: x\nERR02200 DIST call hccl api failed",
)


@pytest.mark.parametrize("text", LOST_PEER)
def test_an_error_that_may_only_say_that_another_rank_is_gone(text: str) -> None:
    assert reads_like_lost_peer(text)


@pytest.mark.parametrize(
    "text",
    [
        "RuntimeError: error code is 507015\nthe task timed out",
        "ValueError: strategy.timeout_s=0 with strategy.hccl",
        "RuntimeError: DataLoader timed out after 30 seconds",
        "RuntimeError: the label server is unreachable",
        "torch.OutOfMemoryError: NPU out of memory. Connection reset",
        "RuntimeError: mat1 and mat2 shapes cannot be multiplied",
    ],
)
def test_an_error_of_this_rank_is_taken_for_no_other_ranks(text: str) -> None:
    assert not reads_like_lost_peer(text)


def test_what_the_package_says_itself_is_no_lost_peer_whatever_it_quotes() -> None:
    assert may_be_lost_peer(ConnectionResetError(104, "x")) and may_be_lost_peer(RuntimeError("Socket closed"))
    assert not may_be_lost_peer(CheckpointError("rank 1: Socket closed")) and not may_be_lost_peer(OSError("timed out"))


def test_the_four_rows_of_trouble_that_the_project_starts_from_have_their_remedies() -> None:
    by_code = {fault.code: fault for fault in FAULTS}
    assert "long_compile" in by_code["107020"].change and "connect_timeout_s" in by_code["107020"].change
    assert "kernels" in by_code["500002"].change and "audit" in by_code["500002"].check
    assert "batch_size" in by_code["out of memory"].change and "tensor_parallel_size" in by_code["out of memory"].change
    assert "warmup=compile" in by_code["BrokenPipe"].change


PLACES = {
    "strategy.hccl": HcclSettings,
    "strategy": NPUTensorParallelStrategy,
    "data": TextDataModule,
    "trainer": Trainer,
}


def test_every_setting_of_a_remedy_exists() -> None:
    seen = set()
    for fault in FAULTS:
        for name in re.findall(r"\b((?:strategy\.hccl|strategy|data|trainer)\.\w+)", f"{fault.check} {fault.change}"):
            place, _, setting = name.rpartition(".")
            if name == "strategy.hccl":
                continue
            assert setting in inspect.signature(PLACES[place]).parameters, f"{fault.code}: {name}"
            seen.add(name)
        for group, value in re.findall(r"\b(warmup|hccl@strategy\.hccl)=(\w+)", fault.change):
            assert (ROOT / "conf" / group.partition("@")[0] / f"{value}.yaml").is_file(), fault.code
    assert {"strategy.hccl.exec_timeout_s", "data.batch_size", "trainer.precision", "strategy.timeout_s"} <= seen


def test_the_page_of_remedies_is_the_tables() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    assert page == troubleshooting(), "run: python -m lightning_npu_tp.devices > docs/troubleshooting.md"
    for fault in FAULTS:
        assert f"### {fault.code}: " in page
