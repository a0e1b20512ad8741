"""Missing synchronisation on the simulated card: each kind raises, and the same program with its wait does not.

Catches a check that sees too little (a race that would hide until a card) or too much (a correct program refused), and
a handler of faults that writes over memory of the program or keeps a real fault to itself.
Every pair differs by one line, the wait. The launch queue of torch_npu is on, as it is by default.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

import ascend_sim
from ascend_sim import hook

N = 1000


@pytest.fixture(autouse=True)
def nothing_pending() -> Iterator[None]:
    torch.npu.synchronize()
    ascend_sim.stream_misuses()
    yield
    # Work of a test that failed on purpose.
    torch.npu.synchronize()
    ascend_sim.stream_misuses()


def side() -> torch.npu.Stream:
    return torch.npu.Stream()


def main() -> torch.npu.Stream:
    return torch.npu.current_stream()


def read_after_write(wait: bool) -> None:
    x, other = torch.zeros(N, device="npu"), side()
    other.wait_stream(main())
    with torch.npu.stream(other):
        x.add_(1)
    if wait:
        main().wait_stream(other)
    _ = x * 2


def read_after_write_by_event(wait: bool) -> None:
    x, other, written = torch.zeros(N, device="npu"), side(), torch.npu.Event()
    other.wait_stream(main())
    with torch.npu.stream(other):
        x.add_(1)
        written.record()
    if wait:
        written.wait()
    _ = x * 2


def event_recorded_too_early(wait: bool) -> None:
    x, other, written = torch.zeros(N, device="npu"), side(), torch.npu.Event()
    other.wait_stream(main())
    with torch.npu.stream(other):
        if not wait:
            written.record()
        x.add_(1)
        if wait:
            written.record()
    written.wait()
    _ = x * 2


def write_after_read(wait: bool) -> None:
    x, other = torch.zeros(N, device="npu"), side()
    other.wait_stream(main())
    with torch.npu.stream(other):
        _ = x * 2
    if wait:
        main().wait_stream(other)
    x.zero_()


def first_use_on_a_side_stream(wait: bool) -> None:
    x, other = torch.ones(N, device="npu"), side()
    if wait:
        other.wait_stream(main())
    with torch.npu.stream(other):
        _ = x * 2
    # x is freed for the main stream when this returns.
    main().wait_stream(other)


def item_of_a_side_stream(wait: bool) -> None:
    x, other = torch.zeros(1, device="npu"), side()
    other.wait_stream(main())
    with torch.npu.stream(other):
        x.add_(1)
    if wait:
        other.synchronize()
    x.item()


def fused_operator(wait: bool) -> None:
    x, other = torch.ones(4, 8, device="npu"), side()
    if wait:
        other.wait_stream(main())
    with torch.npu.stream(other):
        torch.ops.npu.npu_swiglu(x)
    main().wait_stream(other)


def result_of_a_fused_operator(wait: bool) -> None:
    x, other = torch.ones(4, 8, device="npu"), side()
    other.wait_stream(main())
    with torch.npu.stream(other):
        y = torch.ops.npu.npu_swiglu(x)
    if wait:
        main().wait_stream(other)
    _ = y + 1


def copy_on_the_device(wait: bool) -> None:
    x, y, other = torch.ones(N, device="npu"), torch.zeros(N, device="npu"), side()
    other.wait_stream(main())
    with torch.npu.stream(other):
        y.copy_(x)
    if wait:
        torch.npu.synchronize()
    _ = y + 1


def reuse_of_freed_memory(wait: bool) -> None:
    x, other = torch.ones(1 << 20, device="npu"), side()
    other.wait_stream(main())
    with torch.npu.stream(other):
        _ = x * 2
    if wait:
        x.record_stream(other)
    address = x.data_ptr()
    del x
    again = torch.empty(1 << 20, device="npu")
    assert again.data_ptr() == address or wait
    again.zero_()


def host_reads_what_is_copied_to_it(wait: bool) -> None:
    there = torch.empty(N).pin_memory()
    there.copy_(torch.ones(N, device="npu"), non_blocking=True)
    if wait:
        main().synchronize()
    assert there.sum() == N or not wait


def host_overwrites_what_is_copied_from_it(wait: bool) -> None:
    here = torch.ones(N).pin_memory()
    there = here.to("npu", non_blocking=True)
    if wait:
        torch.npu.synchronize()
    here.zero_()
    assert there.sum().item() == N or not wait


def host_copy_by_event(wait: bool) -> None:
    there, copied = torch.empty(N).pin_memory(), torch.npu.Event()
    there.copy_(torch.ones(N, device="npu"), non_blocking=True)
    copied.record()
    if wait:
        copied.synchronize()
    there.numpy().sum()


PROGRAMS: list[Callable[[bool], None]] = [
    read_after_write,
    read_after_write_by_event,
    event_recorded_too_early,
    write_after_read,
    first_use_on_a_side_stream,
    item_of_a_side_stream,
    fused_operator,
    result_of_a_fused_operator,
    copy_on_the_device,
    reuse_of_freed_memory,
    host_reads_what_is_copied_to_it,
    host_overwrites_what_is_copied_from_it,
    host_copy_by_event,
]


def run(program: Callable[[bool], None], wait: bool) -> None:
    program(wait)
    # The host's own misuse is raised by the next operator.
    torch.zeros(1, device="npu")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_missing_wait_raises(program: Callable[[bool], None]) -> None:
    with pytest.raises(RuntimeError, match="stream misuse"):
        run(program, False)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_with_its_wait_the_same_program_passes(program: Callable[[bool], None]) -> None:
    run(program, True)
    assert not ascend_sim.stream_misuses()


def test_the_error_names_both_operations_both_streams_and_the_bytes() -> None:
    with pytest.raises(RuntimeError) as caught:
        read_after_write(False)
    text = str(caught.value)
    for part in ("aten::mul on stream", "reads 4000 bytes at 0x", "aten::add_ on stream", "of device 0 wrote"):
        assert part in text


def test_columns_of_one_matrix_may_be_written_on_two_streams() -> None:
    x, other = torch.zeros(8, 200, device="npu"), side()
    other.wait_stream(main())
    with torch.npu.stream(other):
        x[:, :100].add_(1)
    x[:, 100:].add_(1)


def test_neighbours_in_a_page_of_pinned_memory_do_not_disturb_each_other() -> None:
    both = torch.ones(2, 16).pin_memory()
    both[0].to("npu", non_blocking=True)
    both[1].zero_()
    torch.zeros(1, device="npu")


def test_autograd_waits_between_the_streams_of_forward_and_backward() -> None:
    weight, other = torch.ones(N, device="npu", requires_grad=True), side()
    other.wait_stream(main())
    with torch.npu.stream(other):
        loss = (weight * 2).sum()
    main().wait_stream(other)
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.sum().item() == 2 * N


def test_a_loader_with_pinned_memory_and_prefetched_batches_passes() -> None:
    ahead, batches = side(), [torch.full((N,), float(k)).pin_memory() for k in range(6)]
    total = torch.zeros(N, device="npu")
    for batch in batches:
        with torch.npu.stream(ahead):
            there = batch.to("npu", non_blocking=True)
        main().wait_stream(ahead)
        there.record_stream(main())
        total += there
    assert total[0].item() == sum(range(6))
    assert not ascend_sim.stream_misuses()


def test_the_check_can_be_switched_off() -> None:
    runtime = hook.library("ascendcl")
    runtime.ascend_sim_set_checking(0)
    try:
        read_after_write(False)
    finally:
        runtime.ascend_sim_set_checking(1)


class AlternateStack(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


def stack_of_handler(act: Callable[[], object]) -> int:
    """Bytes of the alternate stack that the signal handlers write while `act` runs, their frames included."""
    size, untouched = 1 << 17, b"\xa5"
    memory = mmap.mmap(-1, size)
    memory[:] = untouched * size
    view = ctypes.c_char.from_buffer(memory)
    before = AlternateStack()
    libc = ctypes.CDLL(None)
    assert libc.sigaltstack(ctypes.byref(AlternateStack(ctypes.addressof(view), 0, size)), ctypes.byref(before)) == 0
    try:
        act()
    finally:
        libc.sigaltstack(ctypes.byref(before), None)
    del view
    depth = len(memory[:].lstrip(untouched))
    memory.close()
    return depth


SANITIZER = os.environ.get("ASCEND_SIM_SANITIZE")


@pytest.mark.skipif(bool(SANITIZER), reason="instrumented code takes more stack")
def test_the_fault_handler_fits_on_the_stack_that_python_gives_it() -> None:
    # A handler that does next to nothing shows what the frame takes: up to 11 KiB, by the processor.
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        frame = stack_of_handler(lambda: signal.raise_signal(signal.SIGUSR1))
    finally:
        signal.signal(signal.SIGUSR1, before)
    whole = stack_of_handler(lambda: host_reads_what_is_copied_to_it(False))
    assert any("the host reads pinned memory" in text for text in ascend_sim.stream_misuses())
    # faulthandler's stack is a frame and 8 KiB, of which it needs some itself.
    assert 0 < whole - frame <= 4096


# The runtime alone, without torch: a guarded copy, on a stream that nobody waits for.
GUARDED_COPY = """
import ctypes, faulthandler, os, signal, sys
from ascend_sim import hook

hook.load_runtime()
runtime = hook.library("ascendcl")

def guarded_copy():
    there, here, size = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t(64)
    assert not runtime.aclrtMalloc(ctypes.byref(there), size, 0)
    assert not runtime.aclrtMallocHost(ctypes.byref(here), size)
    assert not runtime.aclrtMemcpyAsync(there, size, here, size, 1, None)
    return here

here = guarded_copy()
if sys.argv[1] == "after":
    faulthandler.enable()
    here = guarded_copy()
ctypes.memset(here, 1, 1)
print("went on", flush=True)
"""


@pytest.mark.parametrize("death", ["ctypes.string_at(8)", "os.kill(os.getpid(), signal.SIGSEGV)"])
@pytest.mark.parametrize("faulthandler", ["before", "after", "without"])
def test_a_fault_that_is_none_of_ours_ends_the_process_as_it_would_without_us(faulthandler: str, death: str) -> None:
    if faulthandler == "after" and SANITIZER == "thread":
        pytest.skip("ThreadSanitizer blocks a signal while it is handled, so that faulthandler cannot raise it")
    options = ["-X", "faulthandler"] if faulthandler == "before" else []
    command = [sys.executable, *options, "-c", GUARDED_COPY + death, faulthandler]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGSEGV
    assert done.stdout == "went on\n"
    assert done.stderr.count("stream misuse: the host writes pinned memory at byte 0 of the 64 bytes") == 1
    assert done.stderr.count("Fatal Python error: Segmentation fault") == (faulthandler != "without")
