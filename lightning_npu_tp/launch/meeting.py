"""How the ranks of a run find each other: not those of an earlier start, and not without a word while some are missing.

torchrun keeps its key-value store when it starts failed ranks anew, so whatever the last attempt wrote is still there.
And whoever believes, by a variable that is left from another run, that somebody else starts the other ranks would wait
for them until the time-out, which is made for slow steps and takes hours.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from lightning_npu_tp.launch.supervisor import write_to_stderr

# Until the first word, and between two later ones.
_FIRST_WORD_SECONDS, _NEXT_WORD_SECONDS = 10.0, 60.0
_POLL_SECONDS = 0.02


@contextlib.contextmanager
def waiting_is_told(rank: int, world: int, where: str, hint: str) -> Iterator[None]:
    """While the block waits for the other ranks, say so on stderr after 10 s and then once a minute.

    where: the address at which they meet. hint: what to look at if they do not come; a sentence.
    """
    met = threading.Event()
    whom = "rank 0" if rank else "the other ranks"

    def tell() -> None:
        began, pause = time.monotonic(), _FIRST_WORD_SECONDS
        while not met.wait(pause):
            pause = _NEXT_WORD_SECONDS
            waited = time.monotonic() - began
            write_to_stderr(f"Rank {rank} of {world} has waited {waited:.0f} s for {whom} at {where}. {hint}")

    threading.Thread(target=tell, name="waiting for ranks", daemon=True).start()
    try:
        yield
    finally:
        met.set()


def keys_of_this_start(store: dist.Store, *, rank: int, world: int, timeout: timedelta) -> dist.Store:
    """A part of `store` that only this start of the ranks uses, the same for all of them; every rank calls it.

    How often torchrun has restarted is no name for it: each host counts for itself, and not every failure. So each rank
    knocks under a name that nobody had before, and rank 0 answers whoever has knocked, dead or alive, until all the
    others have said that they were answered by it.
    Raises TimeoutError on rank 0 if some do not come, a store's error on the others.
    """
    own = secrets.token_hex(8)
    door = dist.PrefixStore("lightning_npu_tp/start", store)
    if rank > 0:
        door.set(f"knock/{rank}", own)
        first = door.get(f"answer/{own}").decode()
        door.set(f"in/{first}/{rank}", "")
        return dist.PrefixStore(first, store)
    outside = set(range(1, world))
    deadline = time.monotonic() + timeout.total_seconds()
    while outside:
        for other in sorted(outside):
            if door.check([f"in/{own}/{other}"]):
                outside.remove(other)
            elif door.check([f"knock/{other}"]):
                door.set(f"answer/{door.get(f'knock/{other}').decode()}", own)
        if outside and time.monotonic() > deadline:
            raise TimeoutError(f"Ranks {sorted(outside)} of {world} did not come within {timeout}.")
        time.sleep(_POLL_SECONDS)
    return dist.PrefixStore(own, store)
