"""The ops that move keys and values into, within and out of cache blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write keys and values into their cache slots, in place.

    Args:
        k: [num_tokens, num_kv_heads, head_dim], a floating dtype; converted to the cache's.
        v: as k.
        k_cache: [num_blocks, num_kv_heads, block_size, head_dim], any strides but 1 in the last dimension; modified.
        v_cache: as k_cache; modified.
        slot_mapping: [num_tokens] int64, slot = block_id * block_size + offset; -1 skips the token. Slots are distinct.

    Raises:
        ShapeError, DtypeError, DeviceError: an argument does not fit.

    """
    op = "write_kv"
    device = _check.same_device(op, k=k, v=v, k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping)
    check_write(op, k, v, k_cache, v_cache, slot_mapping)
    if k.shape[0]:
        implementation(op, device)(k, v, k_cache, v_cache, slot_mapping)


def copy_blocks(caches: Tensor | Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    """Copy whole blocks, in place; every read happens before any write, so chains and swaps are defined.

    Args:
        caches: a tensor, or several, whose dimension 0 is blocks; modified.
        src: [num_copies] int64 block ids.
        dst: [num_copies] int64 block ids, distinct.

    Raises:
        ShapeError, DtypeError, DeviceError: an argument does not fit.
        IndexError: a block id is outside the cache (checked on the CPU).

    """
    op = "copy_blocks"
    tensors = [caches] if isinstance(caches, Tensor) else list(caches)
    for cache in tensors:
        _check.same_device(op, src=src, dst=dst, caches=cache)
        if cache.dim() == 0:
            _check.rank(op, "caches", cache, ("num_blocks", "..."))
    _check.rank(op, "src", src, ("num_copies",))
    _check.shape(op, "dst", dst, src.shape)
    _check.dtype(op, "src", src, torch.int64)
    _check.dtype(op, "dst", dst, torch.int64)
    if src.shape[0] and tensors:
        implementation(op, src.device)(tensors, src, dst)


def swap_blocks(source: Tensor, target: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks from one cache to another that may lie elsewhere: between a GPU and the host's memory.

    Plain copies by the device's copy engine, one for each run of pairs in which both ids rise by one. With pinned host
    memory they are asynchronous, in the current stream: what was copied to the host is there once that stream has come
    so far, and what is copied from it must stay as it is until then.

    Args:
        source: [num_blocks, ...], any device.
        target: [num_blocks, ...], another tensor of source's dtype and block shape, any device; modified.
        pairs: ids of a block in source and of its place in target; targets are distinct.

    Raises:
        ShapeError, DtypeError: the caches do not fit each other.
        OptionError: a block id is outside its cache.

    """
    op = "swap_blocks"
    if source.dim() == 0:
        _check.rank(op, "source", source, ("num_blocks", "..."))
    _check.shape(op, "target", target, ("num_blocks", *source.shape[1:]))
    _check.dtype(op, "target", target, source.dtype)
    for pair in pairs:
        for name, block_id, cache in zip(("source", "target"), pair, (source, target), strict=True):
            known = f"a block of {name}, 0 to {len(cache) - 1}"
            _check.option(op, "a block id", block_id, 0 <= block_id < len(cache), known)
    first = 0
    for index, (src, dst) in enumerate(pairs):
        if index + 1 < len(pairs) and pairs[index + 1] == (src + 1, dst + 1):
            continue
        start, length = pairs[first], index + 1 - first
        target[start[1] : dst + 1].copy_(source[start[0] : start[0] + length], non_blocking=True)
        first = index + 1


def gather_kv(k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cached keys and values of some sequences, side by side without padding.

    The size of the result depends on seq_lens, so on a GPU this op waits for the device; it is no part of a step.

    Args:
        k_cache: [num_blocks, num_kv_heads, block_size, head_dim], any strides.
        v_cache: as k_cache.
        block_table: [num_seqs, max_blocks] int32; entries past a sequence's end are not read as blocks.
        seq_lens: [num_seqs] int32.

    Returns:
        k and v, each [sum of seq_lens, num_kv_heads, head_dim].

    Raises:
        ShapeError, DtypeError, DeviceError: an argument does not fit.

    """
    op = "gather_kv"
    device = _check.same_device(op, k_cache=k_cache, v_cache=v_cache, block_table=block_table, seq_lens=seq_lens)
    _check.rank(op, "k_cache", k_cache, ("num_blocks", "num_kv_heads", "block_size", "head_dim"))
    _check.shape(op, "v_cache", v_cache, k_cache.shape)
    _check.rank(op, "seq_lens", seq_lens, ("num_seqs",))
    _check.shape(op, "block_table", block_table, (seq_lens.shape[0], "max_blocks"))
    _check.dtype(op, "seq_lens", seq_lens, torch.int32)
    _check.dtype(op, "block_table", block_table, torch.int32)
    total = int(seq_lens.sum())
    k = torch.empty((total, k_cache.shape[1], k_cache.shape[3]), dtype=k_cache.dtype, device=device)
    v = torch.empty((total, v_cache.shape[1], v_cache.shape[3]), dtype=v_cache.dtype, device=device)
    if total:
        implementation(op, device)(k_cache, v_cache, block_table, seq_lens, k, v)
    return k, v


def check_write(op: str, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Check what every op that writes into a cache of floating dtype takes.

    Raises: ShapeError, DtypeError.
    """
    check_write_shapes(op, k, v, k_cache, v_cache, slot_mapping)
    _check.floating(op, k=k, v=v, k_cache=k_cache, v_cache=v_cache)


def check_write_shapes(op: str, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Check what every op that writes into the cache takes, but for its dtype.

    Raises: ShapeError, DtypeError.
    """
    _check.rank(op, "k", k, ("num_tokens", "num_kv_heads", "head_dim"))
    _check.shape(op, "v", v, k.shape)
    _check.shape(op, "k_cache", k_cache, ("num_blocks", k.shape[1], "block_size", k.shape[2]))
    _check.shape(op, "v_cache", v_cache, k_cache.shape)
    _check.shape(op, "slot_mapping", slot_mapping, (k.shape[0],))
    _check.dtype(op, "slot_mapping", slot_mapping, torch.int64)
    _check.last_dim_contiguous(op, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
