"""Large CPU buffers that are not paid for twice: on huge pages, and kept for the next step.

glibc maps every buffer over 32 MiB anew and unmaps it when it is freed, so the gradient of one
layer's experts (185 MB in bfloat16 at hidden 1024, width 704, 64 experts) takes 45,000 page faults in
every step: 48 to 97 ms, where the matmul that fills it takes 50. On a virtual machine whose host takes
freed memory back it is several times that. Many systems give huge pages only to those who ask
(`transparent_hugepage=madvise`); this asks, and reuses what its own tensors have freed. Linux only;
elsewhere the buffers are ordinary ones.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

# glibc's largest mmap threshold: below it, freed memory stays in the process and is reused anyway.
_LARGE_BYTES = 32 << 20
# Sizes are rounded up to eighths of a power of two, so that numbers of rows that vary share regions.
_STEPS_PER_DOUBLING = 8


class _Regions:
    """Mapped regions in use and free; never more in total than was once in use at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[mmap.mmap] = []
        # Tensors die wherever they like, in the middle of `take` too: they only append here, without lock.
        self._returned: deque[mmap.mmap] = deque()
        self._used_bytes = 0
        self._peak_bytes = 0

    def take(self, num_bytes: int) -> mmap.mmap:
        with self._lock:
            while self._returned:
                region = self._returned.popleft()
                self._used_bytes -= len(region)
                self._free.append(region)
            for index, region in enumerate(self._free):
                if len(region) == num_bytes:
                    del self._free[index]
                    break
            else:
                region = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                region.madvise(mmap.MADV_HUGEPAGE)
            self._used_bytes += num_bytes
            self._peak_bytes = max(self._peak_bytes, self._used_bytes)
            while self._free and self._used_bytes + sum(map(len, self._free)) > self._peak_bytes:
                del self._free[0]
            return region

    def give_back(self, region: mmap.mmap) -> None:
        self._returned.append(region)


_REGIONS = _Regions()


def _rounded(num_bytes: int) -> int:
    step = 2 ** math.floor(math.log2(num_bytes)) // _STEPS_PER_DOUBLING
    return -(-num_bytes // step) * step


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor; a large one lies on huge pages and on memory that is used again."""
    num_elements = math.prod(shape)
    num_bytes = num_elements * dtype.itemsize
    if num_bytes <= _LARGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    try:
        region = _REGIONS.take(_rounded(num_bytes))
    except OSError:
        # No memory to map, or a kernel without huge pages: PyTorch's allocator has the last word.
        return torch.empty(shape, dtype=dtype)
    view = memoryview(region)
    # The tensor's storage keeps the view alive, so the view's end is the storage's end.
    weakref.finalize(view, _REGIONS.give_back, region).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=num_elements).view(shape)
