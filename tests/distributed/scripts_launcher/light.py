"""Ranks that come to grief in the way that the first argument names, without Torch and Lightning.

`call` runs a function as a trainer call of the rank, as the launcher does.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback

import stand_ins  # noqa: F401
from say import say

from lightning_npu_tp.launch.child_process import ChildProcess, parent_channel
from lightning_npu_tp.launch.signals import SignalWatch
from lightning_npu_tp.launch.supervisor import Supervisor, end_now

case = sys.argv[1]
rank = int(os.environ.get("LOCAL_RANK", "0"))
channel = parent_channel()


def main():
    if rank == 0:
        names = range(1, 3 if case == "three-ranks" else 2)
        ranks = [start(number) for number in names]
        act_as(Supervisor(ranks, job=None).call)
    elif case == "exit-before-call":
        sys.exit(0)
    elif case == "parent-killed-during-import":
        say_ready()
        time.sleep(100)
    else:
        act_as(channel.call)
    say("END", rank)


def start(number):
    command = [sys.executable, __file__, case]
    return ChildProcess(f"rank {number}", command, env=os.environ | {"LOCAL_RANK": str(number)})


def act_as(call):
    """What this rank does in this case; `call` runs a function as a trainer call of the rank."""
    match case, rank:
        case "killed" | "exit-0-in-call" | "exit-3-in-call" | "raise-and-hang", 0:
            call(block)
        case "killed", _:
            call(lambda: os.kill(os.getpid(), signal.SIGKILL))
        case "exit-0-in-call", _:
            call(lambda: os._exit(0))
        case "exit-3-in-call", _:
            call(warn_and_exit)
        case "raise-and-hang", _:
            try:
                call(fail)
            finally:
                block()
        case "raise-after-call" | "raise-at-the-end", _:
            call(lambda: None)
            if rank == 1:
                time.sleep(1)
                fail()
            elif case == "raise-after-call":
                time.sleep(100)
        case "rank-0-raises-after-call", _:
            call(lambda: None)
            if rank == 0:
                fail()
            call(block)
        case "rank-0-raises", 1:
            call(complain)
        case "rank-0-hangs-unwinding", 1:
            call(block)
        case "rank-0-raises", 0:
            # The interpreter waits for it between the traceback and the functions that it calls at its exit.
            threading.Thread(target=time.sleep, args=(1,)).start()
            call(fail)
        case "rank-0-hangs-unwinding", 0:
            _call_and_handle_interrupt(call)
        case "one-call-more", 1:
            call(lambda: None)
            call(block)
        case "all-raise-and-save", _:
            try:
                call(fail)
            finally:
                # Longer than the others wait for a rank that does not raise. Rank 0 ends them when it ends, and is last
                # here; a real save has collectives.
                time.sleep(6 if rank else 8)
                say("SAVED", rank)
        case "all-raise-and-catch", _:
            try:
                call(fail)
            except ValueError:
                # Longer than rank 0 waits for a rank that has raised alone.
                time.sleep(6 * rank)
            call(lambda: None)
        case "caught-then-another" | "caught-then-done", _:
            try:
                call(fail)
            except ValueError:
                # Rank 0 waits for ranks that have raised alone, and ends the others when it ends.
                time.sleep(6 * rank if case == "caught-then-another" else 8 - 7 * rank)
            if rank == 1 and case == "caught-then-another":
                open("/nonexistent/batch.json")
            if rank == 1:
                os.write(2, b"UserWarning: the batch is halved\n")
            if case == "caught-then-another":
                call(lambda: None)
        case "three-ranks", 1:
            try:
                call(lambda: (time.sleep(0.5), fail()))
            finally:
                # Rank 0 must not have to wait for the end of the process to know.
                time.sleep(5)
        case "three-ranks", _:
            # Rank 2 reports its lost connection before rank 1 has died of the error behind it.
            call(lambda: lose_peer(0.2 if rank == 2 else 0.8))
        case "parent-killed-without-death-signal", 0:
            call(lambda: time.sleep(100))
        case "parent-killed-without-death-signal", _:
            ctypes.CDLL(None).prctl(1, 0)
            threading.Thread(target=channel.end_with_parent, args=(0.1,), daemon=True).start()
            call(say_ready_and_wait)
        case "worker-terminated", _:
            call(end_a_forked_worker)
        case "output", 1:
            call(lambda: os.write(2, b"10%\r20%\r\xff\n  plain\n"))
        case _:
            call(lambda: None)


def fail():
    raise ValueError(f"rank {rank} came to grief")


def warn_and_exit():
    """End with an exit code, after an error that was handled and a warning."""
    try:
        fail()
    except ValueError:
        traceback.print_exc()
    os.write(2, b"UserWarning: something else\n")
    os._exit(3)


def lose_peer(seconds):
    time.sleep(seconds)
    raise RuntimeError("Connection closed by peer")


def complain():
    """Write to stderr all the time."""
    for _ in range(1000):
        os.write(2, b"rank 1 complains\n")
        time.sleep(0.02)


def block():
    """Wait in C as a collective does: no handler runs, and no signal ends the wait."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ctypes.CDLL(None).sleep(100)


def say_ready():
    say("READY", os.getpid())


def say_ready_and_wait():
    say_ready()
    time.sleep(100)


def _call_and_handle_interrupt(call):
    """Named like the function in which Lightning cleans up after an error."""
    try:
        call(fail)
    finally:
        block()


def end_a_forked_worker():
    """What a pool of data workers does at its end, in a rank that watches its signals."""
    watch = SignalWatch(on_sigterm=None, grace_seconds=0.5, notice=lambda: None, end=end_now)
    watch.install()
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,))
    worker.start()
    worker.terminate()
    worker.join()
    time.sleep(1)
    watch.close(unwinding=False)
    say("HANDLER", signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1), worker.exitcode)


if __name__ == "__main__":
    main()
