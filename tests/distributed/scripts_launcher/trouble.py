"""A fit in which a rank comes to grief in the way that the first argument names."""

import ctypes
import os
import signal
import sys
import time

case = sys.argv[1]
rank = int(os.environ.get("LOCAL_RANK", "0"))


def fail():
    raise ValueError(f"rank {rank} came to grief")


if case == "raise-at-import" and rank == 1:
    fail()

from say import say  # noqa: E402
from tiny import TinyModel, tiny_trainer  # noqa: E402


def at_step(model, step):
    if step == 0:
        return
    say("READY", rank, os.getpid())
    if case == "raise-in-step" and rank == 1 or case == "rank-0-raises" and rank == 0:
        fail()
    if case == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "blocked" or case == "rank-1-blocked" and rank == 1:
        # In C as a collective does: no handler runs, and no signal or closed socket ends the wait.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        ctypes.CDLL(None).sleep(100)
    if case not in ("raise-in-step", "killed"):
        time.sleep(100)


if __name__ == "__main__":
    trainer = tiny_trainer(**({"devices": 3} if case == "wrong-count" else {}))
    if case == "raise-before-group" and rank == 1:
        trainer.strategy.setup_environment = fail
    try:
        trainer.fit(TinyModel(at_step))
    finally:
        say("LEFT", rank)
