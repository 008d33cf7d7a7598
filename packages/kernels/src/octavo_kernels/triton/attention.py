"""Attention in Triton over cache blocks or over ragged keys: the kernel for long queries, and the choice of one.

A program owns BLOCK_Q query tokens of one sequence and one key head. The rows of its tile are pairs of a token and a
head of the group, so that keys are read once for all heads that share them:

    row m of BLOCK_M  ->  token m // GROUP, head kv_head * GROUP + m % GROUP

Key tiles start at multiples of BLOCK_N of the absolute position, whatever the batch, so the order of the sums depends
on positions alone. FlashAttention-2 (arXiv 2307.08691, algorithm 1); the softmax is kept in base 2.

Sequences whose queries fit one tile of `split_attention` are its work, each by its own length, as long as the workspace
has room for them; the others are done here.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803, SIM102
# Triton has no types, and its compile-time parameters are written in capitals; conditions on these stand alone.

import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels._options import AttentionOptions
from octavo_kernels.triton._attend import empty_state, ends_chunk, find_sequence, finish, join, step
from octavo_kernels.triton._attention_call import AttentionCall
from octavo_kernels.triton._launch import check_dtypes
from octavo_kernels.triton.split_attention import split_attention


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
    if max_query_len:
        attend(
            AttentionCall(
                q, k_cache, v_cache, query_start_loc, seq_lens, options, out, lse, block_table, k_scale, v_scale
            ),
            max_query_len,
        )


def attend(call: AttentionCall, max_query_len: int, num_split_tiles: int = 1) -> None:
    """Do a call over cache blocks, splitting the keys of sequences whose queries fit so many tiles."""
    longest = num_split_tiles * (call.split_tile(max_query_len).rows // call.group)
    split = split_attention(call, min(max_query_len, longest), call.options.workspace)
    if max_query_len > longest or not split.complete:
        prefill(call, max_query_len, split.plan)


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
    prefill(AttentionCall(q, keys, values, query_start_loc, key_start_loc, options, out, lse), max_query_len, None)


def prefill(call: AttentionCall, max_query_len: int, plan: Tensor | None) -> None:
    """Do the sequences that have no slots in the plan; the grid is a bound that needs no lengths."""
    tile = call.prefill_tile(max_query_len)
    grid = (call.q.shape[0] // (tile.rows // call.group) + call.num_seqs, call.k.shape[1])
    _attend[grid](*call.inputs(), *call.results(), plan, PAGED=call.block_table is not None, **call.constants(tile))


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, query_start_loc, key_lens, block_table, slopes_ptr, k_scale_ptr, v_scale_ptr,
    factor, soft_cap, window, num_seqs, q_stride_t, q_stride_h,
    k_stride_b, k_stride_h, k_stride_o, v_stride_b, v_stride_h, v_stride_o, table_stride,
    ks_stride_b, ks_stride_h, ks_stride_o, vs_stride_b, vs_stride_h, vs_stride_o,
    out_ptr, lse_ptr, sinks_ptr, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h, plan,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, LATE_SCALE: tl.constexpr,
    ALIKE: tl.constexpr, CHUNKED: tl.constexpr, WIDE_DOT: tl.constexpr,
):  # fmt: skip
    """Compute one tile of rows; see the file's docstring for the layout."""
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = find_sequence(query_start_loc, block, num_seqs, BLOCK_Q)
    start = tl.load(query_start_loc + sequence)
    query_len = tl.load(query_start_loc + sequence + 1) - start
    first_query = (block - start // BLOCK_Q - sequence) * BLOCK_Q
    if first_query >= query_len:
        return
    if plan is not None:
        if tl.load(plan + 2 * num_seqs + 1 + sequence) > 0:
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
    live = rows < tl.minimum(BLOCK_Q, query_len - first_query) * GROUP
    tokens = (start + queries).to(tl.int64)
    q_rows = tokens * q_stride_t + heads * q_stride_h
    inside = live[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=inside, other=0.0)
    if WIDE_DOT:
        q = q.to(tl.float32)
    slopes = None
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + heads, mask=live, other=0.0)

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

    whole, whole_max, whole_sum = empty_state(BLOCK_M, BLOCK_D)
    accumulator, row_max, row_sum = empty_state(BLOCK_M, BLOCK_D)
    for first_key in range(first_tile, first_masked, BLOCK_N):
        accumulator, row_max, row_sum = step(
            accumulator, row_max, row_sum, q, first_key, key_base, lowest, highest, offset + queries, slopes, kv_head,
            k_ptr, v_ptr, table_row, k_scale_ptr, v_scale_ptr, factor, soft_cap, window,
            k_stride_b, k_stride_h, k_stride_o, v_stride_b, v_stride_h, v_stride_o,
            ks_stride_b, ks_stride_h, ks_stride_o, vs_stride_b, vs_stride_h, vs_stride_o,
            HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D, PAGED, CAUSAL, WINDOWED, CAPPED, LATE_SCALE, ALIKE, False,
        )  # fmt: skip
        if CHUNKED:
            if ends_chunk(first_key + BLOCK_N):
                whole, whole_max, whole_sum = join(whole, whole_max, whole_sum, accumulator, row_max, row_sum)
                accumulator, row_max, row_sum = empty_state(BLOCK_M, BLOCK_D)
    for first_key in range(first_masked, highest, BLOCK_N):
        accumulator, row_max, row_sum = step(
            accumulator, row_max, row_sum, q, first_key, key_base, lowest, highest, offset + queries, slopes, kv_head,
            k_ptr, v_ptr, table_row, k_scale_ptr, v_scale_ptr, factor, soft_cap, window,
            k_stride_b, k_stride_h, k_stride_o, v_stride_b, v_stride_h, v_stride_o,
            ks_stride_b, ks_stride_h, ks_stride_o, vs_stride_b, vs_stride_h, vs_stride_o,
            HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D, PAGED, CAUSAL, WINDOWED, CAPPED, LATE_SCALE, ALIKE, True,
        )  # fmt: skip
        if CHUNKED:
            if ends_chunk(first_key + BLOCK_N):
                whole, whole_max, whole_sum = join(whole, whole_max, whole_sum, accumulator, row_max, row_sum)
                accumulator, row_max, row_sum = empty_state(BLOCK_M, BLOCK_D)

    if CHUNKED:
        accumulator, row_max, row_sum = join(whole, whole_max, whole_sum, accumulator, row_max, row_sum)
    out_rows = tokens * out_stride_t + heads * out_stride_h
    lse_rows = tokens * lse_stride_t + heads * lse_stride_h
    finish(
        accumulator, row_max, row_sum, sinks_ptr, heads, out_ptr, lse_ptr, out_rows, lse_rows, live, HEAD_DIM, BLOCK_D
    )  # fmt: skip
