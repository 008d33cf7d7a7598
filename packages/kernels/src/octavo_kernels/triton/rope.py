"""Norm, rotary embedding and cache write in one Triton launch.

The grid is tokens by heads: first the heads of q, then those of k, then those of v. A program has one warp, so that all
its loads are done before its stores.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.triton._launch import check_dtypes, next_power_of_2


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
) -> None:
    """Norm and rotate q and k in place, then write k and v."""
    check_dtypes("rope_kv_write", q=q, k=k, v=v)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, rot_dim = k.shape[1], cos_sin.shape[1]
    _rope_write[(num_tokens, num_heads + 2 * num_kv_heads)](
        q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping, q_norm_weight, k_norm_weight, eps,
        num_heads, num_kv_heads, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos_sin.stride(0),
        *k_cache.stride()[:3], *v_cache.stride()[:3],
        HEAD_DIM=head_dim, HALF=rot_dim // 2, BLOCK_SIZE=k_cache.shape[2], BLOCK_D=next_power_of_2(head_dim),
        BLOCK_HALF=next_power_of_2(rot_dim // 2), INTERLEAVED=interleaved, num_warps=1,
    )  # fmt: skip


@triton.jit
def _rotate_head(
    row, cached_row, slot, cos_sin_row, weight_ptr, eps,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, CACHED: tl.constexpr,
):  # fmt: skip
    """Norm and rotate one head in place; if CACHED, and for a slot from 0 on, store it into the cache row too."""
    dims = tl.arange(0, BLOCK_D)
    pairs = tl.arange(0, BLOCK_HALF)
    in_head = dims < HEAD_DIM
    in_pair = pairs < HALF
    if INTERLEAVED:
        first_dims = 2 * pairs
        second_dims = 2 * pairs + 1
    else:
        first_dims = pairs
        second_dims = pairs + HALF
    whole = tl.load(row + dims, mask=in_head, other=0.0).to(tl.float32)
    first = tl.load(row + first_dims, mask=in_pair, other=0.0).to(tl.float32)
    second = tl.load(row + second_dims, mask=in_pair, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        inverse = 1.0 / tl.sqrt(tl.sum(whole * whole, 0) / HEAD_DIM + eps)
        whole = whole * inverse * tl.load(weight_ptr + dims, mask=in_head, other=0.0).to(tl.float32)
        first = first * inverse * tl.load(weight_ptr + first_dims, mask=in_pair, other=0.0).to(tl.float32)
        second = second * inverse * tl.load(weight_ptr + second_dims, mask=in_pair, other=0.0).to(tl.float32)
    cos = tl.load(cos_sin_row + pairs, mask=in_pair, other=0.0)
    sin = tl.load(cos_sin_row + HALF + pairs, mask=in_pair, other=0.0)
    rest = in_head & (dims >= 2 * HALF)
    # Rounded to the tensor's dtype once; the cache gets the rounded values.
    new_first = (first * cos - second * sin).to(row.dtype.element_ty)
    new_second = (second * cos + first * sin).to(row.dtype.element_ty)
    new_rest = whole.to(row.dtype.element_ty)
    tl.store(row + first_dims, new_first, mask=in_pair)
    tl.store(row + second_dims, new_second, mask=in_pair)
    tl.store(row + dims, new_rest, mask=rest)
    if CACHED:  # noqa: SIM102 - decided at compile time, the slot at run time
        if slot >= 0:
            tl.store(cached_row + first_dims, new_first.to(cached_row.dtype.element_ty), mask=in_pair)
            tl.store(cached_row + second_dims, new_second.to(cached_row.dtype.element_ty), mask=in_pair)
            tl.store(cached_row + dims, new_rest.to(cached_row.dtype.element_ty), mask=rest)


@triton.jit
def _rope_write(
    q_ptr, k_ptr, v_ptr, positions, cos_sin, k_cache, v_cache, slot_mapping, q_weight, k_weight, eps,
    num_heads, num_kv_heads, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, cos_sin_stride,
    kc_stride_b, kc_stride_h, kc_stride_o, vc_stride_b, vc_stride_h, vc_stride_o,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slot_mapping + token)
    block_id = tl.maximum(slot, 0) // BLOCK_SIZE
    offset = tl.maximum(slot, 0) % BLOCK_SIZE
    cos_sin_row = cos_sin + tl.load(positions + token) * cos_sin_stride
    if head < num_heads:
        q_row = q_ptr + token * q_stride_t + head * q_stride_h
        _rotate_head(
            q_row, q_row, slot, cos_sin_row, q_weight, eps,
            HEAD_DIM, HALF, BLOCK_D, BLOCK_HALF, INTERLEAVED, False,
        )  # fmt: skip
    elif head < num_heads + num_kv_heads:
        k_head = head - num_heads
        k_row = k_ptr + token * k_stride_t + k_head * k_stride_h
        cached_row = k_cache + block_id * kc_stride_b + k_head * kc_stride_h + offset * kc_stride_o
        _rotate_head(
            k_row, cached_row, slot, cos_sin_row, k_weight, eps,
            HEAD_DIM, HALF, BLOCK_D, BLOCK_HALF, INTERLEAVED, True,
        )  # fmt: skip
    elif slot >= 0:
        v_head = head - num_heads - num_kv_heads
        dims = tl.arange(0, BLOCK_D)
        mask = dims < HEAD_DIM
        v = tl.load(v_ptr + token * v_stride_t + v_head * v_stride_h + dims, mask=mask, other=0.0)
        cached_row = v_cache + block_id * vc_stride_b + v_head * vc_stride_h + offset * vc_stride_o
        tl.store(cached_row + dims, v.to(v_cache.dtype.element_ty), mask=mask)
