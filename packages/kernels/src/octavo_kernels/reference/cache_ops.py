"""Cache writes, copies and reads, one token, block or sequence at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write each token's key and value into its slot."""
    block_size = k_cache.shape[2]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            k_cache[slot // block_size, :, slot % block_size] = k[token].to(k_cache.dtype)
            v_cache[slot // block_size, :, slot % block_size] = v[token].to(v_cache.dtype)


def copy_blocks(caches: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    """Read all source blocks, then write them."""
    for cache in caches:
        blocks = [cache[block_id].clone() for block_id in src.tolist()]
        for block_id, block in zip(dst.tolist(), blocks, strict=True):
            cache[block_id] = block


def gather_kv(k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, k: Tensor, v: Tensor) -> None:
    """Fill k and v with each sequence's cached vectors in turn."""
    start = 0
    for sequence, seq_len in enumerate(seq_lens.tolist()):
        block_ids, offsets = sequence_slots(block_table[sequence], seq_len, k_cache.shape[2])
        k[start : start + seq_len] = k_cache[block_ids, :, offsets]
        v[start : start + seq_len] = v_cache[block_ids, :, offsets]
        start += seq_len


def sequence_slots(block_ids: Tensor, seq_len: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the block id and the offset, each [seq_len], of every position of a sequence."""
    positions = torch.arange(seq_len, device=block_ids.device)
    return block_ids[positions // block_size].long(), positions % block_size
