"""Attention of groups that share blocks, in Triton: an index of the two levels, a launch for each, and their join."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels._options import AttentionOptions
from octavo_kernels._workspace import take
from octavo_kernels.triton._attention_call import AttentionCall
from octavo_kernels.triton._launch import check_dtypes, next_power_of_2
from octavo_kernels.triton.attention import attend
from octavo_kernels.triton.merge import merge_rows

# Groups with more rows than so many tiles keep a device busy without their keys being split.
_PREFIX_TILES = 8


def shared_prefix_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    group_start_loc: Tensor,
    lengths: Tensor,
    *,
    max_query_len: int,
    max_group_query_len: int,
    options: AttentionOptions,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    workspace: Tensor,
) -> None:
    """Fill out and lse as `octavo_kernels.shared_prefix_attention` says."""
    check_dtypes("shared_prefix_attention", q=q, out=out)
    num_seqs, num_groups, max_blocks = len(seq_lens), len(lengths), block_table.shape[1]
    prefix_out, offset = take(workspace, 0, torch.float32, *q.shape)
    suffix_out, offset = take(workspace, offset, torch.float32, *q.shape)
    prefix_lse, offset = take(workspace, offset, torch.float32, *q.shape[:2])
    suffix_lse, offset = take(workspace, offset, torch.float32, *q.shape[:2])
    group_queries, offset = take(workspace, offset, torch.int32, num_groups + 1)
    suffix_lens, offset = take(workspace, offset, torch.int32, num_seqs)
    prefix_table, offset = take(workspace, offset, torch.int32, num_groups, max_blocks)
    suffix_table, offset = take(workspace, offset, torch.int32, num_seqs, max_blocks)
    _index[(num_seqs,)](
        query_start_loc, seq_lens, block_table, group_start_loc, lengths,
        group_queries, suffix_lens, prefix_table, suffix_table, num_seqs, num_groups, max_blocks, block_table.stride(0),
        BLOCK_SIZE=k_cache.shape[2], BLOCK=min(1024, next_power_of_2(max_blocks)), num_warps=4,
    )  # fmt: skip
    suffix_options = replace(options, workspace=workspace[offset:])
    prefix_options = replace(suffix_options, causal=False, sinks=None)
    prefix = AttentionCall(
        q, k_cache, v_cache, group_queries, lengths, prefix_options, prefix_out, prefix_lse, prefix_table,
        k_scale, v_scale,
    )  # fmt: skip
    suffix = AttentionCall(
        q, k_cache, v_cache, query_start_loc, suffix_lens, suffix_options, suffix_out, suffix_lse, suffix_table,
        k_scale, v_scale,
    )  # fmt: skip
    attend(prefix, max_group_query_len, _PREFIX_TILES)
    attend(suffix, max_query_len)
    lse = suffix_lse if lse is None else lse
    merge_rows(prefix_out, prefix_lse, suffix_out, suffix_lse, out, lse, query_start_loc[num_seqs:])


@triton.jit
def _index(
    query_start_loc, seq_lens, block_table, group_start_loc, lengths,
    group_queries, suffix_lens, prefix_table, suffix_table, num_seqs, num_groups, max_blocks, table_stride,
    BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one sequence's suffix, and if it is the first of its group, what the group's queries read."""
    sequence = tl.program_id(0)
    low = 0
    high = num_groups
    while low < high:
        middle = (low + high) // 2
        if tl.load(group_start_loc + middle) <= sequence:
            low = middle + 1
        else:
            high = middle
    group = low - 1
    length = tl.load(lengths + group)
    first = tl.load(group_start_loc + group) == sequence
    tl.store(suffix_lens + sequence, tl.load(seq_lens + sequence) - length)
    if first:
        tl.store(group_queries + group, tl.load(query_start_loc + sequence))
    if sequence == num_seqs - 1:
        tl.store(group_queries + num_groups, tl.load(query_start_loc + num_seqs))
    shared_blocks = length // BLOCK_SIZE
    row = block_table + sequence.to(tl.int64) * table_stride
    for start in range(0, max_blocks, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        known = columns < max_blocks
        if first:
            block_ids = tl.load(row + columns, mask=known)
            tl.store(prefix_table + group * max_blocks + columns, block_ids, mask=known)
        block_ids = tl.load(row + shared_blocks + columns, mask=columns + shared_blocks < max_blocks, other=0)
        tl.store(suffix_table + sequence.to(tl.int64) * max_blocks + columns, block_ids, mask=known)
