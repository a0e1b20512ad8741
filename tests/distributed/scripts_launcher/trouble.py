"""One trainer call in which rank 1, or rank 0, comes to grief in the way that the first argument names."""

import ctypes
import os
import signal
import sys
import time

case = sys.argv[1]
first = os.environ.get("LOCAL_RANK", "0") == "0"


def fail(who):
    raise ValueError(f"{who} came to grief")


if case == "raise-at-import" and not first:
    fail("rank 1")

from tiny import TinyModel, tiny_trainer  # noqa: E402


def at_step(model, step):
    if step < 1:
        return
    if case == "kill" and not first:
        os.kill(os.getpid(), signal.SIGKILL)
    elif case == "raise-in-step" and not first:
        fail("rank 1")
    elif case == "exit-in-step" and not first:
        os._exit(0)
    elif case == "rank-0-raises" and first:
        fail("rank 0")
    elif case == "all-raise":
        fail("every rank")
    elif case == "raise-and-hang" and not first:
        # As with HCCL or NCCL: rank 0 waits in C++ and no closed socket wakes it, and rank 1 hangs unwinding.
        model.trainer.strategy.teardown = lambda: ctypes.CDLL(None).sleep(100)
        fail("rank 1")
    elif case == "raise-and-hang" or (case == "kill-blocked" and first):
        block()
    elif case == "kill-blocked":
        os.kill(os.getpid(), signal.SIGKILL)
    elif case == "wait":
        print("READY", flush=True)
        if first:
            # Rank 1 goes on into a collective, and blocks there in C++.
            time.sleep(100)
    elif case == "both-blocked":
        print("READY", flush=True)
        block()


def block():
    """Wait in C like a collective does: no signal handler runs, and a signal does not end the wait."""
    deadline = time.monotonic() + 100
    with_gil_released = ctypes.CDLL(None).sleep
    signals = ctypes.CDLL(None)
    mask = (ctypes.c_ulong * 16)(*[2**64 - 1] * 16)
    signals.pthread_sigmask(0, mask, None)
    while time.monotonic() < deadline:
        with_gil_released(100)


if __name__ == "__main__":
    if case == "raise-before-group" and not first:
        trainer = tiny_trainer()
        trainer.strategy.setup_environment = lambda: fail("rank 1")
    else:
        trainer = tiny_trainer()
    try:
        trainer.fit(TinyModel(at_step))
    finally:
        print("ENDING", os.getpid(), flush=True)
    if case == "raise-after-fit" and not first:
        fail("rank 1")
    if case == "rank-0-raises-after-fit":
        if first:
            fail("rank 0")
        trainer.validate(TinyModel())
