"""Scratch: memory for gathered blocks that outlives a call, one set per thread.

A gather of a few megabytes into fresh memory costs several times its copying in page faults, since the allocator hands
such memory back to the system at once. The set grows to the largest bucket that a thread has seen, and lives as long as
the thread.
"""

import math
import threading

import torch
from torch import Tensor


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}


_scratch = _Scratch()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory that the thread's next call with this name will overwrite."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    buffer = _scratch.buffers.get(name)
    if buffer is None or buffer.numel() < num_bytes:
        # Memory made in inference mode could not be written outside of it.
        with torch.inference_mode(mode=False):
            buffer = torch.empty(num_bytes, dtype=torch.uint8)
        _scratch.buffers[name] = buffer
    return buffer[:num_bytes].view(dtype).view(shape)
