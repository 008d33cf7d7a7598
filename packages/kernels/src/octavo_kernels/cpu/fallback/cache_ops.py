"""Cache writes, copies and reads by index."""

from collections.abc import Sequence

import torch
from torch import Tensor


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write all tokens at once; skipped tokens are filtered out first."""
    written = slot_mapping >= 0
    if not bool(written.all()):
        k, v, slot_mapping = k[written], v[written], slot_mapping[written]
    block_size = k_cache.shape[2]
    block_ids = torch.div(slot_mapping, block_size, rounding_mode="floor")
    offsets = slot_mapping - block_ids * block_size
    k_cache[block_ids, :, offsets] = k.to(k_cache.dtype)
    v_cache[block_ids, :, offsets] = v.to(v_cache.dtype)


def copy_blocks(caches: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    """Gather the source blocks of a cache into one tensor, then scatter it."""
    for cache in caches:
        cache.index_copy_(0, dst, cache.index_select(0, src))


def gather_kv(k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, k: Tensor, v: Tensor) -> None:
    """Make one list of slots for all sequences, and read it at once."""
    block_size = k_cache.shape[2]
    sequences = torch.repeat_interleave(seq_lens)
    starts = torch.cumsum(seq_lens, 0) - seq_lens
    positions = torch.arange(k.shape[0], device=k.device) - starts[sequences]
    block_ids = block_table[sequences, torch.div(positions, block_size, rounding_mode="floor")].long()
    k.copy_(k_cache[block_ids, :, positions % block_size])
    v.copy_(v_cache[block_ids, :, positions % block_size])
