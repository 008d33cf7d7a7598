"""measure_transfer: how fast blocks are copied to the host and back."""

from __future__ import annotations

import time

import torch

from octavo_engine.preemption import TransferCost
from octavo_kvcache import DEVICE, HOST, BlockCopy
from octavo_kvcache.storage import KVStorage

_NUM_BYTES = 16 << 20
_NUM_ROUNDS = 3


def measure_transfer(storage: KVStorage) -> TransferCost:
    """Time copies of one block and of many; the content of the device's blocks stays what it is.

    Args:
        storage: with a host tier, in which nothing may lie yet.
    """
    num_bytes = storage.bytes_per_block
    num_many = max(1, min(storage.num_blocks, storage.num_host_blocks, _NUM_BYTES // num_bytes) - 1)
    many, one = _seconds(storage, num_many), _seconds(storage, 1)
    if num_many == 1 or many <= one:
        return TransferCost(bytes_per_block=num_bytes, bytes_per_second=num_many * num_bytes / many)
    bytes_per_second = (num_many - 1) * num_bytes / (many - one)
    return TransferCost(
        bytes_per_block=num_bytes,
        bytes_per_second=bytes_per_second,
        seconds_per_move=max(0.0, one - num_bytes / bytes_per_second),
    )


def _seconds(storage: KVStorage, num_blocks: int) -> float:
    """Return what copying some blocks takes one way: half of there and back, at best."""
    block_ids = range(1, num_blocks + 1)
    out = [BlockCopy(block_id, block_id, DEVICE, HOST) for block_id in block_ids]
    back = [BlockCopy(block_id, block_id, HOST, DEVICE) for block_id in block_ids]
    best = float("inf")
    for _ in range(_NUM_ROUNDS):  # the first touches memory that takes no room before
        started = time.perf_counter()
        storage.apply(out)
        storage.apply(back)
        if storage.device.type == "cuda":
            torch.cuda.synchronize(storage.device)
        best = min(best, time.perf_counter() - started)
    return best / 2
