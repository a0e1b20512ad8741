"""What the error codes of HCCL, ACL and torch_npu mean and what to do: the table, as data.

The order is that of how much a fault tells: a torch_npu error usually holds several codes, and the first
row that is found in it is the explanation. Settings are named as `train.py` takes them. How a text is
searched is `fault_text.py`; docs/troubleshooting.md is generated from this table.

Source: the error enumerations and message texts of the torch_npu 2.13.0 wheel, CANN's documentation of its
codes, and public reports of them. None of it was provoked on a card by us.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Restart = Literal["helps", "may help", "does not help"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind of failure.

    code:      what the libraries call it; also the heading in docs/troubleshooting.md.
    title:     what happened, in a few words.
    cause:     why it happens, most frequent reason first.
    check:     where to look.
    change:    which setting to change; "" where none helps.
    restart:   whether starting the run again, from its last checkpoint, is worth it.
    lost_peer: it only says that another rank is gone or late; the cause is to be looked for there.
    pattern:   regular expression that finds it; "" for a number, found as an error code, and for codes of letters.
    """

    code: str
    title: str
    cause: str
    check: str
    change: str = ""
    restart: Restart = "does not help"
    lost_peer: bool = False
    pattern: str = ""

    def sentence(self) -> str:
        """All of it in one paragraph, for an error message."""
        parts = [f"{self.code}: {self.title}.", self.cause, f"Check: {self.check}"]
        if self.change:
            parts.append(f"Change: {self.change}")
        parts.append(f"Starting again {self.restart}.")
        return " ".join(parts)


_LOG = "the device's log under ~/ascend/log"
_NAME_THE_OPERATOR = (
    "`strategy.hccl.launch_blocking=true` makes the traceback point at the operator; if it is one of the fused ones, "
    "`strategy.kernels` chooses the reference for it."
)
_HARDWARE = "`npu-smi info` for the card's health, and the driver's own diagnosis. Take the machine out of use."
_OTHER_RANKS = "the logs of the other ranks: the one that failed first, or hangs, holds the cause."
_COMPILE = "`hccl@strategy.hccl=long_compile` raises all time-outs, and `warmup=compile` compiles before step 0"

MEMORY = (
    Fault(
        code="out of memory",
        title="the device's memory is full",
        cause="Weights, gradients, optimizer states and activations of this rank need more than the device has, or "
        "what is free lies in pieces that are too small.",
        check="the bytes per rank in the table at the start of the run, and other processes on the card "
        "(`lightning-npu-tp doctor`).",
        change="a smaller `data.batch_size` with `trainer.accumulate_grad_batches`, `strategy.recompute=block`, a "
        "shorter `data.sequence_length`, more ranks in `strategy.tensor_parallel_size` or "
        "`strategy.expert_parallel_size`; against pieces `strategy.hccl.expandable_segments=true`.",
        pattern=r"(NPU|CUDA) out of memory|out of memory\. Tried to allocate|CUDA error: out of memory",
    ),
    Fault(
        code="207018",
        title="the device is out of memory",
        cause="The driver itself found no memory: HCCL's buffers or an operator's workspace, which PyTorch's allocator "
        "does not count.",
        check="how much of the card PyTorch has reserved, and other processes on it (`npu-smi info`).",
        change="`strategy.hccl.buffer_mb` (every communicator has two of them), `strategy.hccl.task_queue=1`, and a "
        "smaller `data.batch_size`.",
    ),
    Fault(
        code="207001",
        title="an allocation on the device failed",
        cause="The driver found no memory for what the runtime asked for.",
        check="how much of the card PyTorch has reserved, and other processes on it (`npu-smi info`).",
        change="a smaller `data.batch_size`, `strategy.hccl.buffer_mb`, `strategy.hccl.task_queue=1`.",
    ),
    Fault(
        code="host out of memory",
        title="the host has no memory left to pin",
        cause="Pinned memory on the host could not be had, for copies to the device or for operators on the CPU.",
        check="`free -g`, and the container's limit of locked memory (`ulimit -l`).",
        change="`data.pin_memory=false`, fewer `data.num_workers`.",
        pattern=r"Malloc pin memory failed|host out of memory",
    ),
)

# What the hardware says of itself tells more than the collective that met it.
HARDWARE = (
    Fault(
        code="507053",
        title="the device reports a memory error",
        cause="Memory of the card is damaged, or an operator wrote where it must not.",
        check=_HARDWARE,
        restart="may help",
    ),
    Fault(
        code="507054",
        title="the card's memory has an uncorrectable bit error",
        cause="Hardware: several bits of one word have flipped (ECC).",
        check=_HARDWARE,
        restart="may help",
    ),
    Fault(
        code="507056",
        title="a link between cards failed",
        cause="Hardware or cabling of the card's own network.",
        check=f"{_HARDWARE} `hccn_tool -i 0 -link -g` shows the links.",
        restart="may help",
    ),
    Fault(
        code="507057",
        title="another card is suspected to be broken",
        cause="This rank is well and saw an error that came from another card.",
        check=_OTHER_RANKS,
        restart="may help",
        lost_peer=True,
    ),
)

# HCCL's codes: they are more telling than the runtime's number beside them.
COLLECTIVES = (
    Fault(
        code="EI0001",
        title="an environment variable has a value that HCCL does not take",
        cause="HCCL reads its settings from the environment and found one out of its range.",
        check="`lightning-npu-tp doctor`, which reads every HCCL variable that is exported.",
        change="set it by its field of `strategy.hccl` instead, where its range is checked.",
    ),
    Fault(
        code="EI0002",
        title="a collective waited in vain for another rank",
        cause="A rank did not come to the same collective within the time-out: it failed, hangs, compiles, saves, or "
        "took another path through the model.",
        check=_OTHER_RANKS,
        change="`strategy.hccl.exec_timeout_s`, and `strategy.hccl.event_timeout_s` above it, if the rank is only "
        f"slow; {_COMPILE}.",
        restart="may help",
        lost_peer=True,
    ),
    Fault(
        code="EI0003",
        title="a collective was given arguments that it does not take",
        cause="The dtype, the reduction or the number of elements is not supported: HCCL reduces no float64, and knows "
        "sum, product, maximum and minimum.",
        check="the operation and the dtype in the traceback.",
        change="`trainer.precision`, if it is 64-true.",
    ),
    Fault(
        code="EI0004",
        title="the rank table does not hold",
        cause="RANK_TABLE_FILE is exported and its file is wrong for this run.",
        check="`env | grep RANK_TABLE_FILE`; this package needs none, so unset it.",
    ),
    Fault(
        code="EI0005",
        title="the ranks called one collective with different arguments",
        cause="Ranks differ in the settings, the data or the version of the code, so that shapes or the order of "
        "collectives differ.",
        check="that every host has the same code and configuration; layers that run on some ranks only.",
    ),
    Fault(
        code="EI0006",
        title="the ranks could not be linked in time",
        cause="Another rank did not connect within HCCL_CONNECT_TIMEOUT: it failed, came to its first collective later "
        "because it compiles or loads, or the network between them is closed or another one than expected.",
        check=f"{_OTHER_RANKS} Between hosts: the cards' own addresses, and that TLS is on or off on all of them alike "
        "(`hccn_tool -i 0 -ip -g`, `hccn_tool -i 0 -tls -g`).",
        change=f"`strategy.hccl.connect_timeout_s` (up to 7200); {_COMPILE}; `strategy.hccl.socket_interface` or "
        "`strategy.hccl.interface_ip` for the right network.",
        restart="may help",
        lost_peer=True,
    ),
    Fault(
        code="EI0007",
        title="HCCL could not get a resource",
        cause="Memory, streams or notifications of the device are used up, often by communicators with large buffers.",
        check="other processes on the card (`npu-smi info`) and the free memory of the device.",
        change="`strategy.hccl.buffer_mb` (every communicator has two of them).",
        restart="may help",
    ),
    Fault(
        code="EI0008",
        title="the hosts have different versions of HCCL",
        cause="CANN is not of the same release on every host.",
        check="`lightning-npu-tp doctor` on each host.",
    ),
    Fault(
        code="EI0011",
        title="no memory for a network queue pair",
        cause="The RoCE links of the communicators need more memory than is left.",
        check="other processes on the card (`npu-smi info`).",
        change="`strategy.hccl.buffer_mb`, or a layout with fewer ranks across hosts.",
        restart="may help",
    ),
    Fault(
        code="EI0012",
        title="a copy between cards failed",
        cause="The DMA engine reported an error, mostly because memory of the other card is gone or broken.",
        check=f"{_OTHER_RANKS} Then {_HARDWARE}",
        restart="may help",
        lost_peer=True,
    ),
    Fault(
        code="EI0013",
        title="a packet between hosts was not acknowledged",
        cause="The RoCE network lost the connection: a link went down, a switch is full, or the other rank ended.",
        check=f"{_OTHER_RANKS} Then `hccn_tool -i 0 -link -g` and `hccn_tool -i 0 -stat -g` on both hosts.",
        restart="may help",
        lost_peer=True,
    ),
    Fault(
        code="EI0015",
        title="the ranks did not all report to the first one",
        cause="Before any link is made the ranks tell each other their addresses; one or more did not come in time.",
        check=f"{_OTHER_RANKS} That every host reaches the first one's address.",
        change="`strategy.hccl.connect_timeout_s`, `strategy.hccl.socket_interface`, `strategy.timeout_s`.",
        restart="may help",
        lost_peer=True,
    ),
    Fault(
        code="EI0019",
        title="HCCL could not open its port",
        cause="Another process, often the last run, still holds the port.",
        check="`lightning-npu-tp doctor` for processes on the cards; end them and wait ten seconds.",
        change="HCCL_IF_BASE_PORT in `strategy.hccl.extra`.",
        restart="helps",
    ),
    Fault(
        code="EJ0001",
        title="the card's communication process did not start",
        cause="A process of the last run is still alive on the card.",
        check="`npu-smi info` for processes; end them, wait ten seconds and start again.",
        restart="helps",
    ),
    Fault(
        code="watchdog",
        title="a collective outlasted the process group's time-out",
        cause="A rank did not come to the same collective in time: it failed, hangs, or is slow in something that only "
        "one rank does.",
        check=_OTHER_RANKS,
        change="`strategy.timeout_s`; on Ascend also `strategy.hccl.exec_timeout_s`.",
        restart="may help",
        lost_peer=True,
        pattern=r"Watchdog caught collective operation timeout|dispatch timeout|timed out in blocking wait",
    ),
    Fault(
        code="NCCL",
        title="NCCL lost a rank or a link",
        cause="Another rank ended, or the network between the hosts failed.",
        check=f"{_OTHER_RANKS} NCCL_DEBUG=INFO names the link.",
        change="export NCCL_SOCKET_IFNAME for the right network; `strategy.timeout_s` if a rank is only slow.",
        restart="may help",
        lost_peer=True,
        pattern=r"ncclRemoteError|ncclSystemError|NCCL communicator was aborted|ncclInternalError",
    ),
)

OPERATORS = (
    Fault(
        code="EZ1001",
        title="an operator was given arguments that it does not take",
        cause="A dtype, shape or layout is outside of what the operator's documentation allows, such as group lists "
        "that are not int64.",
        check="the lines after EZ1001: they name the operator and the argument.",
        change=_NAME_THE_OPERATOR,
    ),
    Fault(
        code="500002",
        title="an operator could not be compiled",
        cause="The operator has no kernel for this dtype or shape, or its shape changes (nonzero, boolean indexing, "
        "unique), or CANN's compiler and kernel packages are incomplete.",
        check="E-codes before it name the operator; `lightning-npu-tp audit` lists the operators of a step that the "
        "card does not have.",
        change=f"{_NAME_THE_OPERATOR} In layers of your own replace it by arithmetic of fixed shape.",
        pattern=r"\bE40021\b",
    ),
    Fault(
        code="500001",
        title="ACL failed inside",
        cause="The runtime reports an internal failure, mostly after another error before it.",
        check=f"the first error of this rank, further up, and {_LOG}.",
        change=_NAME_THE_OPERATOR,
        restart="may help",
    ),
)

RUNTIME = (
    Fault(
        code="107002",
        title="no device is bound to this thread",
        cause="A thread used the card before a device was set for it, or after the run had ended.",
        check="threads of your own, data loader workers and callbacks that touch tensors on the device.",
    ),
    Fault(
        code="107003",
        title="a stream of another device was used",
        cause="A tensor or stream belongs to another card than the current one of this thread.",
        check="tensors that were moved by hand to a fixed device; use `self.device` of the module.",
    ),
    Fault(
        code="107019",
        title="a wait on the device timed out",
        cause="What was waited for on the device, mostly a collective, did not end in time.",
        check=_OTHER_RANKS,
        change="`strategy.hccl.event_timeout_s` above `strategy.hccl.exec_timeout_s`.",
        restart="may help",
        lost_peer=True,
    ),
    Fault(
        code="107020",
        title="a task on the device timed out",
        cause="A collective waited for a rank that did not come: while a large model compiles for the first time, that "
        "is the rank that still compiles.",
        check=_OTHER_RANKS,
        change=f"{_COMPILE}; one by one: `strategy.hccl.exec_timeout_s`, `strategy.hccl.event_timeout_s`, "
        "`strategy.hccl.connect_timeout_s`. `strategy.hccl.op_cache_dir` with `strategy.hccl.op_cache_mode=enable` "
        "keeps what was compiled.",
        restart="may help",
        lost_peer=True,
    ),
    Fault(
        code="507046",
        title="waiting for a stream timed out",
        cause="Work on the device did not end: a collective waits for another rank, or an operator hangs.",
        check=_OTHER_RANKS,
        change="`strategy.hccl.exec_timeout_s` if a rank is only slow.",
        restart="may help",
        lost_peer=True,
    ),
    Fault(
        code="507048",
        title="a group of tasks on the device timed out",
        cause="Mostly a collective that waits for another rank.",
        check=_OTHER_RANKS,
        change="`strategy.hccl.exec_timeout_s` if a rank is only slow.",
        restart="may help",
        lost_peer=True,
    ),
    Fault(
        code="507014",
        title="an operator on a matrix core did not end",
        cause="The operator hangs on these shapes or values.",
        check=_LOG,
        change=_NAME_THE_OPERATOR,
        restart="may help",
    ),
    Fault(
        code="507015",
        title="an operator on a matrix core failed",
        cause="It read or wrote outside of its tensors, such as an index past the end, or met shapes that it is not "
        "made for.",
        check=f"token ids and labels against the vocabulary; {_LOG}.",
        change=_NAME_THE_OPERATOR,
    ),
    Fault(
        code="507018",
        title="an operator on the card's CPU failed",
        cause="Operators without a kernel for the cores run there; an index past the end is the most frequent reason.",
        check=f"token ids and labels against the vocabulary; {_LOG}.",
        change=_NAME_THE_OPERATOR,
    ),
    Fault(
        code="507035",
        title="an operator on a vector core failed",
        cause="It read or wrote outside of its tensors, such as an index past the end, or met shapes that it is not "
        "made for.",
        check=f"token ids and labels against the vocabulary; {_LOG}.",
        change=_NAME_THE_OPERATOR,
    ),
    Fault(
        code="507011",
        title="a model on the device failed",
        cause="One of the operators that were compiled together failed.",
        check=f"the first error of this rank, further up, and {_LOG}.",
        change=_NAME_THE_OPERATOR,
    ),
    Fault(
        code="BrokenPipe",
        title="a process at the other end of a pipe has ended",
        cause="On Ascend it is mostly one of the processes in which CANN compiles operators: it was killed for memory, "
        "or the run ended while it worked.",
        check="the host's memory while the first step compiles, and `dmesg` for killed processes.",
        change="`warmup=compile`; `strategy.hccl.op_cache_dir` with `strategy.hccl.op_cache_mode=enable`, so that a "
        "second start compiles nothing again.",
        restart="helps",
        pattern=r"BrokenPipe|Broken pipe|\[Errno 32\]",
    ),
    Fault(
        code="launch queue",
        title="torch_npu has stopped handing work to the card",
        cause="A call to the card failed in the thread that makes them, and a thread of torch_npu swallowed its error.",
        check=f"the last errors in {_LOG}, in plog-PID_*.log of this process; without one, "
        "`strategy.hccl.launch_blocking=true`, with which there is no such thread.",
        restart="may help",
        pattern=r"launch queue has ended",
    ),
)

# ERRmmccc, torch_npu's own: who reports, and what kind of error.
ERR_MODULES = {
    "00": "torch_npu",
    "01": "an operator",
    "02": "the process group",
    "03": "a graph",
    "04": "the profiler",
    "99": "the application",
}
ERR_KINDS = {
    "001": "a parameter is not valid",
    "002": "a type is not valid",
    "003": "a value is not valid",
    "004": "a pointer is not valid",
    "005": "an error inside of torch_npu",
    "006": "an error of memory",
    "007": "it is not supported",
    "008": "something was not found",
    "009": "something is not available now",
    "010": "a system call failed",
    "011": "a time-out",
    "012": "no permission",
    "100": "a call of ACL, the runtime, failed",
    "200": "a call of HCCL failed",
    "300": "a call of GE, the graph engine, failed",
    "999": "an exception outside of torch_npu",
}

FAULTS: tuple[Fault, ...] = (*MEMORY, *HARDWARE, *COLLECTIVES, *OPERATORS, *RUNTIME)
