"""native_threads: native CPU ops on several threads, torch's own ops between them on the calling one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_local = threading.local()


@contextmanager
def native_threads(num_threads: int) -> Iterator[None]:
    """Let native ops of this thread use `num_threads` threads meanwhile, and torch's ops none but this one.

    torch's workers keep their cores busy for milliseconds after each op that they had a part in, waiting for the next.
    Native ops have threads of their own, which then lack these cores: a few small ops of torch between them make a step
    of a model take two to three times as long. Open it around steps whose products and attention are native.

    A thread that calls torch for the first time while this is open elsewhere starts with one thread too.

    Args:
        num_threads: of native ops, at least 1.

    Example:
        >>> with native_threads(torch.get_num_threads()):
        ...     hidden = packed_linear(x, weight)  # on all cores
        ...     last = hidden[indices]  # torch, on this one

    """
    before, num_torch = getattr(_local, "num_threads", None), torch.get_num_threads()
    _local.num_threads = num_threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_torch)
        _local.num_threads = before


def num_native_threads() -> int:
    """Return how many threads native ops of this thread use: torch's number where `native_threads` is not open."""
    return getattr(_local, "num_threads", None) or torch.get_num_threads()
