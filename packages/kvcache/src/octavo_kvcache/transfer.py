"""transfer_blocks: copies blocks between tensors of the device and tensors of the host."""

import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def transfer_blocks(sources: Sequence[Tensor], destinations: Sequence[Tensor], origins: Mapping[int, int]) -> None:
    """Copy blocks from each source to the destination at its place; only the order on a GPU's stream is kept.

    Args:
        sources: tensors whose dimension 0 is blocks, contiguous; of one tier.
        destinations: as many, of the other tier; modified.
        origins: the source block of each destination block.

    """
    dst_ids = sorted(origins)
    src_ids = [origins[block_id] for block_id in dst_ids]
    for source, destination in zip(sources, destinations, strict=True):
        if source.device == destination.device:
            move(source, destination, src_ids, dst_ids)
        elif destination.device.type == "cpu":
            gather(source, destination, src_ids, dst_ids)
        else:
            scatter(source, destination, src_ids, dst_ids)


def move(source: Tensor, destination: Tensor, src_ids: Sequence[int], dst_ids: Sequence[int]) -> None:
    """Copy on a CPU, in this thread: torch would start its threads for each tensor, beside those of the kernels."""
    num_bytes = source.stride(0) * source.element_size()
    src_start, dst_start = source.data_ptr(), destination.data_ptr()
    for src, dst, length in runs(src_ids, dst_ids):
        ctypes.memmove(dst_start + dst * num_bytes, src_start + src * num_bytes, length * num_bytes)


def gather(source: Tensor, destination: Tensor, src_ids: Sequence[int], dst_ids: Sequence[int]) -> None:
    """Copy from a GPU: bring the blocks together there, then copy them in as few pieces as their places allow."""
    buffer = source.index_select(0, ids_on(source.device, src_ids))
    for place, dst, length in runs(range(len(dst_ids)), dst_ids):
        destination[dst : dst + length].copy_(buffer[place : place + length], non_blocking=True)


def scatter(source: Tensor, destination: Tensor, src_ids: Sequence[int], dst_ids: Sequence[int]) -> None:
    """Copy to a GPU: in as few pieces as the blocks' places allow, then to where they belong there."""
    buffer = destination.new_empty((len(src_ids), *destination.shape[1:]))
    for src, place, length in runs(src_ids, range(len(src_ids))):
        buffer[place : place + length].copy_(source[src : src + length], non_blocking=True)
    destination.index_copy_(0, ids_on(destination.device, dst_ids), buffer)


def ids_on(device: torch.device, block_ids: Iterable[int]) -> Tensor:
    """Return block ids as a tensor [num_blocks] int64 on a device, without waiting for what that device is doing."""
    ids = torch.tensor(list(block_ids), dtype=torch.int64)
    if device.type == "cuda":  # a copy from memory that is not pinned would wait
        return ids.pin_memory().to(device, non_blocking=True)
    return ids.to(device)


def runs(src_ids: Sequence[int], dst_ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield where blocks follow each other on both sides: first source, first destination, and how many."""
    pairs = list(zip(src_ids, dst_ids, strict=True))
    follows = [after == (before[0] + 1, before[1] + 1) for before, after in pairwise(pairs)]
    breaks = [index for index, following in enumerate(follows, 1) if not following]
    for start, stop in pairwise([0, *breaks, len(pairs)]):
        yield *pairs[start], stop - start
