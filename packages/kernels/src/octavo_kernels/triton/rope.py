"""Rotary embedding with an optional norm per head and the cache write in Triton, for caches in full or of 8 bits.

A token (many in the interpreter) has programs for its heads of q, HEADS at a time, and then for those of k and v. A
head is taken in three parts: the first elements of the pairs that are rotated, their second elements, and the rest.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels._codes import LARGEST_CODE
from octavo_kernels.triton._codes import codes_of, inverse_of, larger, largest_magnitude, stored
from octavo_kernels.triton._launch import check_dtypes, next_power_of_2, rows_of_a_program

_TILE = 2048  # elements of q that a program takes


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
    _launch(
        q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping, None, None, interleaved, q_norm_weight,
        k_norm_weight, eps,
    )  # fmt: skip


def rope_kv_write_quant(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    interleaved: bool,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
) -> None:
    """Norm and rotate q and k in place, then write the codes of k and v, and their scales where each slot has some."""
    check_dtypes("rope_kv_write_quant", q=q, k=k, v=v)
    _launch(
        q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping, k_scale, v_scale, interleaved, q_norm_weight,
        k_norm_weight, eps,
    )  # fmt: skip


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    interleaved: bool,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
) -> None:
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, half = k.shape[1], cos_sin.shape[1] // 2
    block_d = next_power_of_2(head_dim)
    heads = min(next_power_of_2(num_heads), max(1, _TILE // block_d))
    q_programs, kv_programs = triton.cdiv(num_heads, heads), triton.cdiv(num_kv_heads, heads)
    tokens = rows_of_a_program(num_tokens, heads * block_d)
    _rope_write[(triton.cdiv(num_tokens, tokens) * (q_programs + kv_programs),)](
        q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping, k_scale, v_scale, q_norm_weight, k_norm_weight,
        eps, num_tokens, num_heads, num_kv_heads, q_programs, q_programs + kv_programs,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos_sin.stride(0),
        *k_cache.stride()[:3], *v_cache.stride()[:3], *_scale_strides(k_scale), *_scale_strides(v_scale),
        HEAD_DIM=head_dim, HALF=half, BLOCK_SIZE=k_cache.shape[2], TOKENS=tokens, HEADS=heads, BLOCK_D=block_d,
        BLOCK_HALF=next_power_of_2(half), BLOCK_REST=next_power_of_2(head_dim - 2 * half), INTERLEAVED=interleaved,
        LARGEST=0.0 if k_scale is None else LARGEST_CODE[k_cache.dtype],
        MEASURED=k_scale is not None and k_scale.dim() == 3, num_warps=max(1, heads * block_d // 512),
    )  # fmt: skip


def _scale_strides(scale: Tensor | None) -> tuple[int, int, int]:
    """Return the strides of blocks, heads and slots."""
    if scale is None:
        return 0, 0, 0
    return (0, scale.stride(0), 0) if scale.dim() == 1 else (scale.stride(0), scale.stride(1), scale.stride(2))


@triton.jit
def _load_parts(
    rows, live, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Load heads in three parts, in fp32; rows [num_rows] point to them."""
    num_rows: tl.constexpr = rows.shape[0]
    pairs = tl.arange(0, BLOCK_HALF)[None, :]
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        turned = tl.load(rows[:, None] + both, mask=live[:, None] & (both < 2 * HALF), other=0.0)
        first, second = tl.split(tl.reshape(turned, [num_rows, BLOCK_HALF, 2]))
    else:
        mask = live[:, None] & (pairs < HALF)
        first = tl.load(rows[:, None] + pairs, mask=mask, other=0.0)
        second = tl.load(rows[:, None] + HALF + pairs, mask=mask, other=0.0)
    behind = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    rest = tl.load(rows[:, None] + behind, mask=live[:, None] & (behind < HEAD_DIM), other=0.0)
    return first.to(tl.float32), second.to(tl.float32), rest.to(tl.float32)


@triton.jit
def _store_parts(
    rows, live, first, second, rest, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Store heads that are given in three parts, in the dtype of what rows [num_rows] point to."""
    num_rows: tl.constexpr = rows.shape[0]
    pairs = tl.arange(0, BLOCK_HALF)[None, :]
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        turned = tl.reshape(tl.join(first, second), [num_rows, 2 * BLOCK_HALF])
        tl.store(rows[:, None] + both, turned, mask=live[:, None] & (both < 2 * HALF))
    else:
        mask = live[:, None] & (pairs < HALF)
        tl.store(rows[:, None] + pairs, first, mask=mask)
        tl.store(rows[:, None] + HALF + pairs, second, mask=mask)
    behind = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    tl.store(rows[:, None] + behind, rest, mask=live[:, None] & (behind < HEAD_DIM))


@triton.jit
def _turn(
    rows, live, cos_sin_rows, weight_ptr, eps, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Norm and rotate heads in place; return them in three parts, as they are stored.

    cos_sin_rows points to the row of all heads, or to one for each: [num_rows, 1].
    """
    first, second, rest = _load_parts(rows, live, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED)
    if weight_ptr is not None:
        one = tl.arange(0, 1)
        by_first, by_second, by_rest = _load_parts(
            weight_ptr + one, one == 0, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED
        )  # fmt: skip
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(rest * rest, 1)
        inverse = (1.0 / tl.sqrt(square / HEAD_DIM + eps))[:, None]
        first = first * inverse * by_first
        second = second * inverse * by_second
        rest = rest * inverse * by_rest
    pairs = tl.arange(0, BLOCK_HALF)[None, :]
    cos = tl.load(cos_sin_rows + pairs, mask=pairs < HALF, other=0.0)
    sin = tl.load(cos_sin_rows + HALF + pairs, mask=pairs < HALF, other=0.0)
    dtype: tl.constexpr = rows.dtype.element_ty
    # Rounded to the tensor's dtype once; the cache gets the rounded values.
    new_first = stored(first * cos - second * sin, dtype)
    new_second = stored(second * cos + first * sin, dtype)
    new_rest = stored(rest, dtype)
    tl.debug_barrier()  # threads may store what others have loaded
    _store_parts(rows, live, new_first, new_second, new_rest, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED)
    return new_first, new_second, new_rest


@triton.jit
def _cached(x, inverse, DTYPE: tl.constexpr, LARGEST: tl.constexpr):
    """Return vectors [num_rows, ...] as the cache holds them: codes where there are inverse scales [num_rows]."""
    if inverse is None:
        held = stored(x.to(tl.float32), DTYPE)
    else:
        held = codes_of(x.to(tl.float32), inverse[:, None], DTYPE, LARGEST)
    return held


@triton.jit
def _inverse_scale(scales, largest, live, LARGEST: tl.constexpr, MEASURED: tl.constexpr):
    """Return the inverse scale of each head, and write the scale where it comes from the head itself."""
    if MEASURED:
        scale = tl.div_rn(largest, LARGEST)
        tl.store(scales, scale, mask=live)
    else:
        scale = tl.load(scales, mask=live, other=0.0)
    return inverse_of(scale)


@triton.jit
def _rope_write(
    q_ptr, k_ptr, v_ptr, positions, cos_sin, k_cache, v_cache, slot_mapping, k_scale, v_scale, q_weight, k_weight, eps,
    num_tokens, num_heads, num_kv_heads, q_programs, num_programs,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, cos_sin_stride,
    kc_stride_b, kc_stride_h, kc_stride_o, vc_stride_b, vc_stride_h, vc_stride_o,
    ks_stride_b, ks_stride_h, ks_stride_o, vs_stride_b, vs_stride_h, vs_stride_o,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr,
    LARGEST: tl.constexpr, MEASURED: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) // num_programs).to(tl.int64)
    program = tl.program_id(0) % num_programs
    row_heads = tl.arange(0, TOKENS * HEADS) % HEADS
    if TOKENS > 1:
        token = token * TOKENS + tl.arange(0, TOKENS * HEADS) // HEADS
    inside = token + tl.zeros_like(row_heads) < num_tokens
    token = tl.minimum(token, num_tokens - 1)
    cos_sin_rows = cos_sin + tl.load(positions + token) * cos_sin_stride
    if TOKENS > 1:
        cos_sin_rows = cos_sin_rows[:, None]
    if program < q_programs:
        q_heads = program * HEADS + row_heads
        _turn(
            q_ptr + token * q_stride_t + q_heads * q_stride_h, inside & (q_heads < num_heads), cos_sin_rows, q_weight,
            eps, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED,
        )  # fmt: skip
    else:
        heads = (program - q_programs) * HEADS + row_heads
        live = inside & (heads < num_kv_heads)
        first, second, rest = _turn(
            k_ptr + token * k_stride_t + heads * k_stride_h, live, cos_sin_rows, k_weight, eps,
            HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED,
        )  # fmt: skip
        slot = tl.load(slot_mapping + token)
        live = live & (slot + tl.zeros_like(row_heads) >= 0)
        block_id = tl.maximum(slot, 0) // BLOCK_SIZE
        offset = tl.maximum(slot, 0) % BLOCK_SIZE
        dims = tl.arange(0, BLOCK_D)[None, :]
        mask = live[:, None] & (dims < HEAD_DIM)
        v_rows = v_ptr + token * v_stride_t + heads * v_stride_h
        v = tl.load(v_rows[:, None] + dims, mask=mask, other=0.0)
        k_inverse = None
        v_inverse = None
        if k_scale is not None:
            largest = largest_magnitude(v.to(tl.float32))
            v_scales = v_scale + block_id * vs_stride_b + heads * vs_stride_h + offset * vs_stride_o
            v_inverse = _inverse_scale(v_scales, largest, live, LARGEST, MEASURED)
            largest = larger(
                larger(largest_magnitude(first.to(tl.float32)), largest_magnitude(second.to(tl.float32))),
                largest_magnitude(rest.to(tl.float32)),
            )  # fmt: skip
            k_scales = k_scale + block_id * ks_stride_b + heads * ks_stride_h + offset * ks_stride_o
            k_inverse = _inverse_scale(k_scales, largest, live, LARGEST, MEASURED)
        dtype: tl.constexpr = k_cache.dtype.element_ty
        _store_parts(
            k_cache + block_id * kc_stride_b + heads * kc_stride_h + offset * kc_stride_o, live,
            _cached(first, k_inverse, dtype, LARGEST), _cached(second, k_inverse, dtype, LARGEST),
            _cached(rest, k_inverse, dtype, LARGEST), HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED,
        )  # fmt: skip
        cached_rows = v_cache + block_id * vc_stride_b + heads * vc_stride_h + offset * vc_stride_o
        tl.store(cached_rows[:, None] + dims, _cached(v, v_inverse, dtype, LARGEST), mask=mask)
