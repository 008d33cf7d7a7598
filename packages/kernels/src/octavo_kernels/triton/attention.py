"""Attention in Triton: prefill and decode in one launch, over cache blocks or over ragged keys.

A program owns BLOCK_Q query tokens of one sequence and one key head. The rows of its tile are pairs of a token and a
head of the group, so that keys are read once for all heads that share them:

    row m of BLOCK_M  ->  token m // GROUP, head kv_head * GROUP + m % GROUP

Key tiles start at multiples of BLOCK_N of the absolute position, whatever the batch, so the order of the sums depends
on positions alone. FlashAttention-2 (arXiv 2307.08691, algorithm 1); the softmax is kept in base 2.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels._options import AttentionOptions
from octavo_kernels.triton._launch import check_dtypes, interpreted, next_power_of_2

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2.0))


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    max_query_len: int,
    options: AttentionOptions,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Fill out and lse as `octavo_kernels.paged_attention` says."""
    check_dtypes("paged_attention", q=q)
    _launch(
        q, k_cache, v_cache, query_start_loc, seq_lens, options, max_query_len, out, lse,
        block_table=block_table, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start_loc: Tensor,
    key_start_loc: Tensor,
    *,
    max_query_len: int,
    max_key_len: int,  # noqa: ARG001 - the loop over keys ends where each sequence ends
    options: AttentionOptions,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Fill out and lse as `octavo_kernels.varlen_attention` says."""
    check_dtypes("varlen_attention", q=q)
    # [num_keys, num_kv_heads, head_dim] -> one block of num_keys slots
    keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (k, v))
    _launch(q, keys, values, query_start_loc, key_start_loc, options, max_query_len, out, lse)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start_loc: Tensor,
    key_lens: Tensor,
    options: AttentionOptions,
    max_query_len: int,
    out: Tensor,
    lse: Tensor | None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    num_tokens, num_heads, head_dim = q.shape
    num_seqs, num_kv_heads = query_start_loc.shape[0] - 1, k.shape[1]
    group = num_heads // num_kv_heads
    block_d = max(16, next_power_of_2(head_dim))
    block_m, num_warps = _tile_rows(q.dtype, block_d, group, max_query_len)
    # A function of dtype and head_dim alone: the order of the sums must not depend on the batch.
    block_n = 64 if block_d <= 128 and q.dtype != torch.float32 else 32
    block_q = block_m // group
    late_scale = options.soft_cap is not None or options.alibi_slopes is not None
    grid = (num_tokens // block_q + num_seqs, num_kv_heads)
    _attend[grid](
        q, k, v, out, lse, query_start_loc, key_lens, block_table, options.sinks, options.alibi_slopes,
        k_scale, v_scale,
        options.scale if late_scale else options.scale * math.log2(math.e),
        options.soft_cap or 0.0, options.window or 0, num_seqs,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1),
        0 if lse is None else lse.stride(0), 0 if lse is None else lse.stride(1),
        k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
        0 if block_table is None else block_table.stride(0),
        *((0, 0, 0) if k_scale is None else k_scale.stride()),
        *((0, 0, 0) if v_scale is None else v_scale.stride()),
        GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=1 if block_table is None else k.shape[2],
        BLOCK_M=block_m, BLOCK_Q=block_q, BLOCK_N=block_n, BLOCK_D=block_d,
        PAGED=block_table is not None, CAUSAL=options.causal, WINDOWED=options.window is not None,
        CAPPED=options.soft_cap is not None, LATE_SCALE=late_scale,
        WIDE_DOT=interpreted() and q.dtype == torch.bfloat16, num_warps=num_warps, num_stages=2,
    )  # fmt: skip


def _tile_rows(dtype: torch.dtype, block_d: int, group: int, max_query_len: int) -> tuple[int, int]:
    """Return BLOCK_M and the number of warps: few rows for decode, enough for Hopper's wgmma (64) for prefill."""
    least = max(16, next_power_of_2(group))
    if max_query_len * group <= 16:
        return least, 4
    if dtype == torch.float32 or block_d > 128 or max_query_len * group <= 64:
        return max(least, 64), 4
    return max(least, 128), 8


@triton.jit
def _find_sequence(query_start_loc, block, num_seqs, BLOCK_Q: tl.constexpr):
    """Return the last sequence whose first query block is at or before `block`.

    Sequence s owns the blocks from query_start_loc[s] // BLOCK_Q + s on: enough for its tokens, and no host arithmetic.
    """
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // BLOCK_Q + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _step(
    accumulator, row_max, row_sum, q, first_key, key_base, lowest, highest, positions, slopes, kv_head,
    k_ptr, v_ptr, table_row, k_scale_ptr, v_scale_ptr, factor, soft_cap, window,
    k_stride_b, k_stride_h, k_stride_o, v_stride_b, v_stride_h, v_stride_o,
    ks_stride_b, ks_stride_h, ks_stride_o, vs_stride_b, vs_stride_h, vs_stride_o,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    LATE_SCALE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into the running softmax (arXiv 1805.02867, algorithm 3)."""
    keys = first_key + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    # Slots outside lowest .. highest - 1 are seen by no row and may hold NaN, so they are not read.
    present = (keys >= lowest) & (keys < highest)
    if PAGED:
        block_ids = tl.load(table_row + keys // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
        offsets = (keys % BLOCK_SIZE).to(tl.int64)
    else:
        block_ids = tl.zeros([BLOCK_N], tl.int64)
        offsets = key_base + keys
    k_rows = block_ids * k_stride_b + kv_head * k_stride_h + offsets * k_stride_o
    v_rows = block_ids * v_stride_b + kv_head * v_stride_h + offsets * v_stride_o
    mask = (dims < HEAD_DIM)[None, :]
    if MASKED:
        mask = mask & present[:, None]
    k = tl.load(k_ptr + k_rows[:, None] + dims[None, :], mask=mask, other=0.0).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    if k_scale_ptr is not None:
        k_scales = block_ids * ks_stride_b + kv_head * ks_stride_h + offsets * ks_stride_o
        scores *= tl.load(k_scale_ptr + k_scales, mask=present, other=0.0)[None, :]
    distance = positions[:, None] - keys[None, :]
    if CAPPED:
        # tanh(y) = 1 - 2 / (exp(2y) + 1), which overflows to the right limit.
        scores = soft_cap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * _LOG2E / soft_cap)) + 1.0))
    if slopes is not None:
        scores -= slopes[:, None] * tl.abs(distance).to(tl.float32)
    if LATE_SCALE:
        scores *= _LOG2E
    if MASKED:
        visible = present[None, :] & (distance == distance)
        if CAUSAL:
            visible = visible & (distance >= 0)
        if WINDOWED:
            visible = visible & (tl.abs(distance) < window)
        scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # A row that has seen nothing yet has maximum -inf, and -inf minus -inf would be NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(row_max - shift)
    row_sum = row_sum * decay + tl.sum(weights, 1)
    v = tl.load(v_ptr + v_rows[:, None] + dims[None, :], mask=mask, other=0.0).to(q.dtype)
    if v_scale_ptr is not None:
        v_scales = block_ids * vs_stride_b + kv_head * vs_stride_h + offsets * vs_stride_o
        weights *= tl.load(v_scale_ptr + v_scales, mask=present, other=0.0)[None, :]
    accumulator = accumulator * decay[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")
    return accumulator, new_max, row_sum


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, query_start_loc, key_lens, block_table, sinks_ptr, slopes_ptr,
    k_scale_ptr, v_scale_ptr, factor, soft_cap, window, num_seqs,
    q_stride_t, q_stride_h, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
    k_stride_b, k_stride_h, k_stride_o, v_stride_b, v_stride_h, v_stride_o, table_stride,
    ks_stride_b, ks_stride_h, ks_stride_o, vs_stride_b, vs_stride_h, vs_stride_o,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, LATE_SCALE: tl.constexpr,
    WIDE_DOT: tl.constexpr,
):  # fmt: skip
    """Compute one tile of rows; see the file's docstring for the layout."""
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = _find_sequence(query_start_loc, block, num_seqs, BLOCK_Q)
    start = tl.load(query_start_loc + sequence)
    query_len = tl.load(query_start_loc + sequence + 1) - start
    first_query = (block - start // BLOCK_Q - sequence) * BLOCK_Q
    if first_query >= query_len:
        return
    key_base = tl.load(key_lens + sequence)
    seq_len = key_base
    table_row = block_table
    if PAGED:
        table_row = block_table + sequence.to(tl.int64) * table_stride
    else:
        seq_len = tl.load(key_lens + sequence + 1) - key_base

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    queries = first_query + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    live = (rows < BLOCK_Q * GROUP) & (queries < query_len)
    tokens = (start + queries).to(tl.int64)
    inside = live[:, None] & (dims < HEAD_DIM)[None, :]
    q_rows = tokens * q_stride_t + heads * q_stride_h
    q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=inside, other=0.0)
    if WIDE_DOT:
        q = q.to(tl.float32)

    offset = seq_len - query_len
    first_position = offset + first_query
    last_position = offset + tl.minimum(first_query + BLOCK_Q, query_len) - 1
    lowest = 0
    highest = seq_len
    all_see = seq_len
    if CAUSAL:
        highest = tl.minimum(seq_len, last_position + 1)
        all_see = tl.minimum(seq_len, first_position + 1)
    if WINDOWED:
        lowest = tl.maximum(0, first_position - window + 1)
        if not CAUSAL:
            highest = tl.minimum(seq_len, last_position + window)
    first_tile = lowest // BLOCK_N * BLOCK_N
    # Tiles that every row sees whole need no mask; with a window all tiles take one.
    first_masked = first_tile
    if not WINDOWED:
        first_masked = tl.maximum(all_see, 0) // BLOCK_N * BLOCK_N

    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if sinks_ptr is not None:
        row_max = tl.load(sinks_ptr + heads, mask=live, other=0.0) * _LOG2E
        row_sum = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
    slopes = None
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + heads, mask=live, other=0.0)
    for first_key in range(first_tile, first_masked, BLOCK_N):
        accumulator, row_max, row_sum = _step(
            accumulator, row_max, row_sum, q, first_key, key_base, lowest, highest, offset + queries, slopes, kv_head,
            k_ptr, v_ptr, table_row, k_scale_ptr, v_scale_ptr, factor, soft_cap, window,
            k_stride_b, k_stride_h, k_stride_o, v_stride_b, v_stride_h, v_stride_o,
            ks_stride_b, ks_stride_h, ks_stride_o, vs_stride_b, vs_stride_h, vs_stride_o,
            HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D, PAGED, CAUSAL, WINDOWED, CAPPED, LATE_SCALE, False,
        )  # fmt: skip
    for first_key in range(first_masked, highest, BLOCK_N):
        accumulator, row_max, row_sum = _step(
            accumulator, row_max, row_sum, q, first_key, key_base, lowest, highest, offset + queries, slopes, kv_head,
            k_ptr, v_ptr, table_row, k_scale_ptr, v_scale_ptr, factor, soft_cap, window,
            k_stride_b, k_stride_h, k_stride_o, v_stride_b, v_stride_h, v_stride_o,
            ks_stride_b, ks_stride_h, ks_stride_o, vs_stride_b, vs_stride_h, vs_stride_o,
            HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D, PAGED, CAUSAL, WINDOWED, CAPPED, LATE_SCALE, True,
        )  # fmt: skip

    empty = row_sum == 0.0
    denominator = tl.where(empty, 1.0, row_sum)
    result = accumulator / denominator[:, None]
    out_rows = tokens * out_stride_t + heads * out_stride_h
    tl.store(out_ptr + out_rows[:, None] + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)
    if lse_ptr is not None:
        lse = tl.where(empty, float("-inf"), (row_max + tl.log2(denominator)) * _LN2)
        tl.store(lse_ptr + tokens * lse_stride_t + heads * lse_stride_h, lse, mask=live)
