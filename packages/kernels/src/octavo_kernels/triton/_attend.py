"""What attention kernels share: tiles of keys taken into a softmax, states joined, and where chunks of keys lie.

A state is what a row has seen so far: its largest score (base 2), the sum of its weights and their sum of values.

Batch-invariant kernels cut keys into chunks at fixed positions; `octavo_kernels._split_workspace` has them. A
chunk's state starts empty, and states are joined in the order of their positions, by one program as it goes or by a
later launch from memory: both do the same operations, so the bits do not tell which.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import math

import triton
import triton.language as tl

from octavo_kernels import _split_workspace

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
# Every tile of keys is a power of two up to 128, so that none lies in two chunks.
_NEAR_CHUNK = tl.constexpr(_split_workspace.NEAR_CHUNK)
_FAR_CHUNK = tl.constexpr(_split_workspace.FAR_CHUNK)
_FAR = tl.constexpr(_split_workspace.FAR)


@triton.jit
def chunk_of(position):
    """Return the index of the chunk that holds a position."""
    far = _FAR // _NEAR_CHUNK + (position - _FAR) // _FAR_CHUNK
    return tl.where(position < _FAR, position // _NEAR_CHUNK, far)


@triton.jit
def chunk_start(chunk):
    """Return the first position of a chunk."""
    near_chunks = _FAR // _NEAR_CHUNK
    return tl.where(chunk < near_chunks, chunk * _NEAR_CHUNK, _FAR + (chunk - near_chunks) * _FAR_CHUNK)


@triton.jit
def ends_chunk(end):
    """Return whether a chunk ends before position `end`."""
    return end % tl.where(end <= _FAR, _NEAR_CHUNK, _FAR_CHUNK) == 0


@triton.jit
def find_sequence(query_start_loc, block, num_seqs, BLOCK_Q: tl.constexpr):
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
def empty_state(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the state of rows that have seen nothing."""
    accumulator = tl.zeros([ROWS, WIDTH], tl.float32)
    return accumulator, tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def join(accumulator_a, max_a, sum_a, accumulator_b, max_b, sum_b):
    """Return the state of rows that have seen what a saw and what b saw (arXiv 1805.02867, section 3.1)."""
    top = tl.maximum(max_a, max_b)
    # Where neither has seen anything the maximum is -inf, and -inf minus -inf would be NaN.
    shift = tl.where(top == float("-inf"), 0.0, top)
    share_a = tl.exp2(max_a - shift)
    share_b = tl.exp2(max_b - shift)
    # Fused by hand: all kernels must round alike.
    row_sum = tl.fma(sum_a, share_a, sum_b * share_b)
    accumulator = tl.fma(
        accumulator_a, tl.broadcast_to(share_a[:, None], accumulator_a.shape), accumulator_b * share_b[:, None]
    )
    return accumulator, top, row_sum


@triton.jit
def finish(
    accumulator, row_max, row_sum, sinks_ptr, heads, out_ptr, lse_ptr, out_rows, lse_rows, live,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the result of rows whose state is whole but for the sink; a row that has seen nothing gets 0 and -inf."""
    if sinks_ptr is not None:
        # A weight without a value, and the last one: parts of a sequence know nothing of it.
        sinks = tl.load(sinks_ptr + heads, mask=live, other=0.0) * LOG2E
        nothing = tl.zeros_like(accumulator)
        ones = tl.full(sinks.shape, 1.0, tl.float32)
        accumulator, row_max, row_sum = join(accumulator, row_max, row_sum, nothing, sinks, ones)
    dims = tl.arange(0, BLOCK_D)
    empty = row_sum == 0.0
    denominator = tl.where(empty, 1.0, row_sum)
    result = accumulator / denominator[:, None]
    inside = live[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out_ptr + out_rows[:, None] + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)
    if lse_ptr is not None:
        lse = tl.where(empty, float("-inf"), (row_max + tl.log2(denominator)) * LN2)
        tl.store(lse_ptr + lse_rows, lse, mask=live)


@triton.jit
def step(
    accumulator, row_max, row_sum, q, first_key, key_base, lowest, highest, positions, slopes, kv_head,
    k_ptr, v_ptr, table_row, k_scale_ptr, v_scale_ptr, factor, soft_cap, window,
    k_stride_b, k_stride_h, k_stride_o, v_stride_b, v_stride_h, v_stride_o,
    ks_stride_b, ks_stride_h, ks_stride_o, vs_stride_b, vs_stride_h, vs_stride_o,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    LATE_SCALE: tl.constexpr, ALIKE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into the running softmax (arXiv 1805.02867, algorithm 3)."""
    keys = first_key + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    # Slots outside lowest .. highest - 1 are seen by no row and may hold NaN, so they are not read.
    present = keys < highest
    if WINDOWED:
        present = present & (keys >= lowest)
    if PAGED:
        # Once per tile, for K, V and their scales; a tensor rather than scalars, so that the loop prefetches it.
        block_ids = tl.load(table_row + keys // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
        offsets = (keys % BLOCK_SIZE).to(tl.int64)
    else:
        block_ids = tl.zeros([BLOCK_N], tl.int64)
        offsets = key_base + keys
    k_rows = block_ids * k_stride_b + kv_head * k_stride_h + offsets * k_stride_o
    v_rows = k_rows
    if not ALIKE:
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
        scores = soft_cap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / soft_cap)) + 1.0))
    if slopes is not None:
        scores -= slopes[:, None] * tl.abs(distance).to(tl.float32)
    if LATE_SCALE:
        scores *= LOG2E
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
    row_sum = tl.fma(row_sum, decay, tl.sum(weights, 1))
    v = tl.load(v_ptr + v_rows[:, None] + dims[None, :], mask=mask, other=0.0).to(q.dtype)
    if v_scale_ptr is not None:
        v_scales = block_ids * vs_stride_b + kv_head * vs_stride_h + offsets * vs_stride_o
        weights *= tl.load(v_scale_ptr + v_scales, mask=present, other=0.0)[None, :]
    accumulator = tl.dot(weights.to(q.dtype), v, accumulator * decay[:, None], input_precision="ieee")
    return accumulator, new_max, row_sum
