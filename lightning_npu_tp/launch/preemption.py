"""A SIGTERM while training (a preempted job): all ranks stop after the same optimizer step, so that they can save.

The signal reaches the ranks at different moments, and a rank that stopped at once would leave the others in a
collective. So each goes on, says in the store that it knows, and rank 0, once all do, names a step that none has
passed. Nothing is asked of anybody while no signal has come.
"""

from __future__ import annotations

import torch.distributed as dist

_PREFIX = "lightning_npu_tp/preempted"
# A step cannot begin on one rank before the last has ended on every other, since each has collectives of all.
_AHEAD = 2


class Preemption:
    """One rank's part; `ask` from the signal handler, `due` at the end of every optimizer step."""

    def __init__(self) -> None:
        self.asked = False
        self._told = False
        self._last_step: int | None = None

    def ask(self) -> None:
        """Note that the job is to end: a checkpoint at the next step that all ranks reach."""
        self.asked = True

    def due(self, step: int) -> bool:
        """Whether this rank, which has just ended optimizer step `step`, stops here; the same on all ranks."""
        if not self.asked:
            return False
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return True
        store, rank, world = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
        if not self._told:
            store.set(f"{_PREFIX}/{rank}", "1")
            self._told = True
        if self._last_step is None:
            if rank == 0 and store.check([f"{_PREFIX}/{other}" for other in range(world)]):
                store.set(f"{_PREFIX}/step", str(step + _AHEAD))
            if store.check([f"{_PREFIX}/step"]):
                self._last_step = int(store.get(f"{_PREFIX}/step"))
        return self._last_step is not None and step >= self._last_step
