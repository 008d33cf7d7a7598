"""host_empty: memory of the CPU in large pages, for what is read again and again all over: weights, KV caches.

A processor remembers where a few thousand pages lie; with pages of 4 KiB that is far less than a model. Linux gives
pages of 2 MiB where it is asked to.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 64
_LARGE_PAGE = 2 << 20
_REGION = 32 << 20  # smaller pieces share one
# How much later in its first page each large tensor begins than the one before: after 512 of them anew.
_STAGGER = 297 << 12


def host_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor of zeros on the CPU, in large pages where the system has them, at a multiple of 64 bytes.

    Physical memory is taken when it is first written. It is given back when no tensor uses any part of the region it
    lies in; small tensors share regions of 32 MiB, so this is for memory that lives as long as a model. Large tensors
    begin at different places in their first pages: the system takes a while to clear a page, and tensors that fill at
    the same pace, as the layers of a KV cache do, would all come to a new one at the same time.
    """
    num_bytes = max(1, math.prod(shape)) * dtype.itemsize
    memory = _regions.take(num_bytes)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype)[: math.prod(shape)].view(*shape)


class _Regions:
    """Hands out pieces of memory maps, one after the other; a map lives as long as any piece of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest: memoryview | None = None
        self._num_large = 0

    def take(self, num_bytes: int) -> memoryview:
        num_bytes = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            if num_bytes >= _REGION:
                self._num_large += 1
                return _map(num_bytes, self._num_large * _STAGGER % _LARGE_PAGE)
            if self._rest is None or len(self._rest) < num_bytes:
                self._rest = _map(_REGION, 0)
            piece, self._rest = self._rest[:num_bytes], self._rest[num_bytes:]
        return piece


_regions = _Regions()


def _map(num_bytes: int, offset: int) -> memoryview:
    """Return a new memory map that begins at an offset in a large page."""
    if sys.platform == "win32":
        region = mmap.mmap(-1, num_bytes + _LARGE_PAGE)
    else:  # Linux gives large pages to private memory, to shared memory only where shmem_enabled says so
        region = mmap.mmap(-1, num_bytes + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        region.madvise(mmap.MADV_HUGEPAGE)
    memory = memoryview(region)
    start = (offset - torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()) % _LARGE_PAGE
    return memory[start : start + num_bytes]
