"""Cache writes, copies and reads in Triton: a program has one token, one stretch of a block, or one block."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels._blocks import flat_blocks
from octavo_kernels.triton._launch import check_dtypes, next_power_of_2


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write each token's key and value into its slot."""
    check_dtypes("write_kv", k=k, v=v)
    num_tokens, num_kv_heads, head_dim = k.shape
    _write[(num_tokens, num_kv_heads)](
        k, v, k_cache, v_cache, slot_mapping,
        *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        HEAD_DIM=head_dim, BLOCK_SIZE=k_cache.shape[2], BLOCK_D=next_power_of_2(head_dim), num_warps=1,
    )  # fmt: skip


def copy_blocks(caches: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    """Copy the source blocks of each cache aside, then to their places, so that chains and swaps are defined."""
    parts = [part for cache in caches for part in flat_blocks(cache)]
    aside = torch.empty(
        len(src) * max(part.shape[1] * part.element_size() for part in parts), dtype=torch.uint8, device=src.device
    )
    for part in parts:
        num_blocks, size = len(src), part.shape[1]
        held = aside[: num_blocks * size * part.element_size()].view(part.dtype).view(num_blocks, size)
        block = min(1024, next_power_of_2(size))
        grid = (num_blocks, triton.cdiv(size, block))
        _copy[grid](held, part, None, src, size, held.stride(0), part.stride(0), BLOCK=block, num_warps=4)
        _copy[grid](part, held, dst, None, size, part.stride(0), held.stride(0), BLOCK=block, num_warps=4)


def gather_kv(k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, k: Tensor, v: Tensor) -> None:
    """Fill k and v with each sequence's cached vectors in turn."""
    ends = torch.cumsum(seq_lens, 0, dtype=torch.int64)
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    for cache, result in ((k_cache, k), (v_cache, v)):
        _gather[(*block_table.shape, num_kv_heads)](
            cache, result, block_table, ends, seq_lens, block_table.stride(0), block_table.stride(1), *cache.stride(),
            *result.stride()[:2], HEAD_DIM=head_dim, BLOCK_SIZE=block_size, BLOCK_O=next_power_of_2(block_size),
            BLOCK_D=next_power_of_2(head_dim), num_warps=4,
        )  # fmt: skip


@triton.jit
def _copy(to_ptr, from_ptr, to_ids, from_ids, size, to_stride, from_stride, BLOCK: tl.constexpr):
    """Copy a stretch of one block; without ids blocks lie in the order of the copies."""
    to_block = tl.program_id(0).to(tl.int64)
    from_block = to_block
    if to_ids is not None:
        to_block = tl.load(to_ids + to_block)
    if from_ids is not None:
        from_block = tl.load(from_ids + from_block)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(from_ptr + from_block * from_stride + places, mask=places < size)
    tl.store(to_ptr + to_block * to_stride + places, values, mask=places < size)


@triton.jit
def _gather(
    cache, result, block_table, ends, seq_lens, table_stride_s, table_stride_b,
    stride_b, stride_h, stride_o, stride_d, result_stride_t, result_stride_h,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copy one block of one sequence and head to its rows."""
    sequence = tl.program_id(0)
    head = tl.program_id(2)
    seq_len = tl.load(seq_lens + sequence)
    first = tl.program_id(1) * BLOCK_SIZE
    if first >= seq_len:
        return
    block_id = tl.load(block_table + sequence * table_stride_s + tl.program_id(1) * table_stride_b).to(tl.int64)
    start = tl.load(ends + sequence) - seq_len
    offsets = tl.arange(0, BLOCK_O)
    dims = tl.arange(0, BLOCK_D)
    written = (offsets < BLOCK_SIZE) & (first + offsets < seq_len)
    mask = written[:, None] & (dims < HEAD_DIM)[None, :]
    row = cache + block_id * stride_b + head * stride_h
    values = tl.load(row + offsets[:, None] * stride_o + dims[None, :] * stride_d, mask=mask)
    places = (start + first + offsets) * result_stride_t + head * result_stride_h
    tl.store(result + places[:, None] + dims[None, :], values, mask=mask)


@triton.jit
def _write(
    k_ptr, v_ptr, k_cache, v_cache, slot_mapping, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    kc_stride_b, kc_stride_h, kc_stride_o, vc_stride_b, vc_stride_h, vc_stride_o,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    block_id = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    dims = tl.arange(0, BLOCK_D)
    mask = dims < HEAD_DIM
    k = tl.load(k_ptr + token * k_stride_t + head * k_stride_h + dims, mask=mask)
    v = tl.load(v_ptr + token * v_stride_t + head * v_stride_h + dims, mask=mask)
    k_row = k_cache + block_id * kc_stride_b + head * kc_stride_h + offset * kc_stride_o
    v_row = v_cache + block_id * vc_stride_b + head * vc_stride_h + offset * vc_stride_o
    tl.store(k_row + dims, k.to(k_cache.dtype.element_ty), mask=mask)
    tl.store(v_row + dims, v.to(v_cache.dtype.element_ty), mask=mask)
