"""shared_prefix_attention: attention of groups of sequences that begin with the same cache blocks."""

from typing import NamedTuple

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation
from octavo_kernels._options import AttentionOptions
from octavo_kernels._split_workspace import attention_workspace
from octavo_kernels._workspace import aligned, check_workspace
from octavo_kernels.attention import check_lse, check_paged, result_like


class SharedPrefixes(NamedTuple):
    """Which sequences share what.

    group_start_loc: [num_groups + 1] int32, from 0 to num_seqs and rising at each step: group g is the sequences
    group_start_loc[g] .. group_start_loc[g + 1] - 1. lengths: [num_groups] int32, tokens that a group shares: a
    multiple of block_size, 0 for a group that shares nothing. max_group_query_len: the most query tokens that a
    group's sequences have together, or more.
    """

    group_start_loc: Tensor
    lengths: Tensor
    max_group_query_len: int


def shared_prefix_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    shared: SharedPrefixes,
    *,
    max_query_len: int,
    scale: float,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Return what causal `paged_attention` gives, reading what a group shares once for all of its queries.

    Two levels: all queries of a group as one sequence over the shared blocks, each query over the rest of its own
    sequence, and the two joined (cascade attention; Hydragen, arXiv 2402.05099). It pays from about 1024 shared tokens
    and 8 sequences on. On a CPU `paged_attention` finds shared blocks by itself; there this op is the reference.

    A query's bits depend on its own keys and on how many of them are shared, not on who shares them.

    Args:
        q: as in `paged_attention`, like the next five.
        k_cache: see there.
        v_cache: see there.
        query_start_loc: see there.
        seq_lens: see there. A sequence's queries are behind what its group shares.
        block_table: see there. The first lengths[g] // block_size entries are the same for all sequences of group g.
        shared: the groups.
        max_query_len: the longest query_len of the batch, or more.
        scale: factor on the scores.
        soft_cap: s becomes soft_cap * tanh(s / soft_cap).
        sinks: [num_heads] fp32.
        k_scale: [num_blocks, num_kv_heads, block_size] fp32.
        v_scale: as k_scale. Both or neither are given.
        out: like q; allocated when None.
        lse: [num_tokens, num_heads] fp32.
        workspace: [at least shared_prefix_workspace(...)] uint8, which the call overwrites; allocated when None.

    Returns:
        out.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "shared_prefix_attention"
    device = _check.same_device(
        op, q=q, k_cache=k_cache, v_cache=v_cache, query_start_loc=query_start_loc, seq_lens=seq_lens,
        block_table=block_table, group_start_loc=shared.group_start_loc, lengths=shared.lengths, sinks=sinks,
        k_scale=k_scale, v_scale=v_scale, out=out, lse=lse, workspace=workspace,
    )  # fmt: skip
    options = AttentionOptions(scale, True, None, soft_cap, sinks, None, batch_invariant=True)
    check_paged(op, q, k_cache, v_cache, query_start_loc, seq_lens, block_table, k_scale, v_scale, options)
    _check.option(op, "max_query_len", max_query_len, max_query_len >= 0, "at least 0")
    num_seqs, num_groups = len(seq_lens), len(shared.lengths)
    _check.rank(op, "lengths", shared.lengths, ("num_groups",))
    _check.shape(op, "group_start_loc", shared.group_start_loc, (num_groups + 1,))
    _check.dtype(op, "lengths", shared.lengths, torch.int32)
    _check.dtype(op, "group_start_loc", shared.group_start_loc, torch.int32)
    most = shared.max_group_query_len
    _check.option(op, "max_group_query_len", most, most >= max_query_len, f"at least max_query_len, {max_query_len}")
    out = result_like(op, q, out)
    check_lse(op, q, lse)
    num_tokens, num_heads, head_dim = q.shape
    if num_seqs and num_tokens and max_query_len:
        size = _fixed_bytes(num_tokens, num_seqs, num_groups, block_table.shape[1], num_heads, head_dim)
        if workspace is None:
            workspace = torch.empty(
                shared_prefix_workspace(
                    num_tokens, num_seqs, num_groups, block_table.shape[1], k_cache.shape[2], num_heads,
                    k_cache.shape[1], head_dim, max_query_len=max_query_len, max_group_query_len=most,
                ),
                dtype=torch.uint8, device=device,
            )  # fmt: skip
        # What is left behind the fixed part goes to each level in turn, and needs a plan's bytes at least.
        workspace = check_workspace(op, workspace, size + aligned(4 * (3 * num_seqs + 2)), device)
        implementation(op, device)(
            q, k_cache, v_cache, query_start_loc, seq_lens, block_table, shared.group_start_loc, shared.lengths,
            max_query_len=max_query_len, max_group_query_len=most, options=options, k_scale=k_scale, v_scale=v_scale,
            out=out, lse=lse, workspace=workspace,
        )  # fmt: skip
    return out


def shared_prefix_workspace(
    num_tokens: int,
    num_seqs: int,
    num_groups: int,
    max_blocks: int,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    max_query_len: int,
    max_group_query_len: int,
) -> int:
    """Return the bytes of workspace that `shared_prefix_attention` is best given, by the sizes of its arguments.

    Raises: OptionError (a size is below 1).
    """
    fixed = _fixed_bytes(num_tokens, num_seqs, num_groups, max_blocks, num_heads, head_dim)
    limits = max_blocks * block_size, num_heads, num_kv_heads, head_dim
    levels = (num_groups, max_group_query_len), (num_seqs, max_query_len)
    return fixed + max(attention_workspace(count, *limits, max_query_len=longest) for count, longest in levels)


def _fixed_bytes(
    num_tokens: int, num_seqs: int, num_groups: int, max_blocks: int, num_heads: int, head_dim: int
) -> int:
    """Return the bytes of both levels' results, and of the index of groups and of suffixes."""
    results = 2 * (aligned(4 * num_tokens * num_heads * head_dim) + aligned(4 * num_tokens * num_heads))
    index = aligned(4 * (num_groups + 1)) + aligned(4 * num_seqs)
    return results + index + aligned(4 * num_groups * max_blocks) + aligned(4 * num_seqs * max_blocks)
