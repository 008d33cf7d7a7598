"""The cache writes, copies and reads of the `cpu` backend: native writes of fp32, plain copies, torch for the rest."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from octavo_kernels._dispatch import note_fallback
from octavo_kernels.cpu import abi
from octavo_kernels.cpu.fallback import cache_ops as in_torch
from octavo_kernels.cpu.fallback.cache_ops import gather_kv
from octavo_kernels.cpu.launch import launch, pointer
from octavo_kernels.cpu.load import library_for

__all__ = ["copy_blocks", "gather_kv", "unserved_codes", "unserved_write", "write_kv"]

_CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write each token's key and value into its slot."""
    op = "write_kv"
    native = library_for(op) is not None
    if native:
        reason = unserved_write(k, v, k_cache, v_cache, slot_mapping)
        if reason is not None:
            note_fallback(op, reason)
            native = False
    if not native:
        in_torch.write_kv(k, v, k_cache, v_cache, slot_mapping)
        return
    num_tokens, num_kv_heads, head_dim = k.shape
    args = abi.RopeKvWriteArgs(
        None, pointer(k), pointer(v), None, None, pointer(k_cache), pointer(v_cache), pointer(slot_mapping), None, None,
        None, None, 0, 0, *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        0, 0, 0, 0, 0, 0,
        0, num_kv_heads, head_dim, 0, k_cache.shape[2], abi.DTYPE_CODES[k_cache.dtype], 0, 1, 0, 0.0, 0.0,
    )  # fmt: skip
    launch(abi.OpKind.ROPE_KV_WRITE, args, num_tokens, k, v, k_cache, v_cache, slot_mapping)


def copy_blocks(caches: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    """Copy block after block, in this thread.

    A step of beams copies a few blocks in every layer: torch would start its threads twice for each layer, which takes
    longer than the copies. Chains and swaps, which need every read before any write, and caches in pieces are torch's.
    """
    sources, destinations = src.tolist(), dst.tolist()
    if not set(sources).isdisjoint(destinations) or not all(cache.is_contiguous() for cache in caches):
        in_torch.copy_blocks(caches, src, dst)
        return
    num_blocks = min(cache.shape[0] for cache in caches)
    if not all(0 <= block_id < num_blocks for block_id in (*sources, *destinations)):
        raise IndexError(f"copy_blocks: block ids must lie in [0, {num_blocks}), got {sources} to {destinations}")
    for cache in caches:
        start, num_bytes = cache.data_ptr(), cache.stride(0) * cache.element_size()
        for source, destination in zip(sources, destinations, strict=True):
            ctypes.memmove(start + destination * num_bytes, start + source * num_bytes, num_bytes)


def unserved_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> str | None:
    """Say what about a write to the cache the native library does not serve; None where it does."""
    if k_cache.dtype != v_cache.dtype or k_cache.dtype not in _CACHE_DTYPES:
        dtypes = " and ".join(str(x.dtype).removeprefix("torch.") for x in (k_cache, v_cache))
        return f"the caches have dtypes {dtypes}, expected one of float32, bfloat16 or float16 for both"
    return _unserved_vectors(k, v, slot_mapping)


def unserved_codes(k: Tensor, v: Tensor, k_cache: Tensor, slot_mapping: Tensor) -> str | None:
    """Say what about a write to a cache of 8 bits the native library does not serve; None where it does."""
    if k_cache.dtype != torch.int8:
        dtype = str(k_cache.dtype).removeprefix("torch.")
        return f"the caches have dtype {dtype}, expected int8; native code knows no FP8"
    return _unserved_vectors(k, v, slot_mapping)


def _unserved_vectors(k: Tensor, v: Tensor, slot_mapping: Tensor) -> str | None:
    if k.dtype != torch.float32 or v.dtype != torch.float32:
        dtypes = " and ".join(str(x.dtype).removeprefix("torch.") for x in (k, v))
        return f"k and v have dtypes {dtypes}, expected float32; convert them with .float()"
    if not slot_mapping.is_contiguous():
        return "slot_mapping is not contiguous; pass slot_mapping.contiguous()"
    return None
