"""Attention over cache blocks and over ragged keys, whole buckets of sequences at a time.

Sequences with equal query_len and about equal length form a bucket; a bucket's blocks are gathered by one index per
layer, and its scores are one batched product. Grouped heads are rows of the same product, so keys are never repeated.

The result of a sequence may change in its last bits with its neighbours: the padded length and the number of rows
decide how the matrix library orders its sums. Only compiled kernels can promise more.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_kernels._options import AttentionOptions
from octavo_kernels.cpu.attend import Span, attend, product_dtype
from octavo_kernels.cpu.scratch import scratch

# A bucket gathers at most _BUCKET_BYTES of keys, of which at most _PADDING_BYTES may be padding: past that, the time
# spent on padding exceeds that of the ten or so calls of one more bucket.
_BUCKET_BYTES = 4 << 20
_PADDING_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Where one sequence's queries are, and which of its blocks they can see."""

    index: int
    start: int
    query_len: int
    seq_len: int
    first_block: int
    num_blocks: int


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    max_query_len: int,  # noqa: ARG001 - the lengths themselves are at hand
    options: AttentionOptions,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Fill out and lse as `octavo_kernels.paged_attention` says."""
    sequences = _sequences(query_start_loc.tolist(), seq_lens.tolist(), k_cache.shape[2], options)
    block_bytes = k_cache[0].numel() * k_cache.element_size()
    for bucket in _buckets(sequences, block_bytes):
        block_ids = _block_ids(block_table, bucket)
        rows = _rows(bucket, q.device)
        query = q.index_select(0, rows).view(len(bucket), -1, *q.shape[1:])
        dtype = product_dtype(q.dtype, query.shape[1], options, with_lse=lse is not None)
        k, v = _gather(k_cache, block_ids, k_scale, dtype, "k"), _gather(v_cache, block_ids, v_scale, dtype, "v")
        starts = [sequence.first_block * k_cache.shape[2] for sequence in bucket]
        span = Span.make(starts, [sequence.seq_len for sequence in bucket], query.shape[1], k.shape[2], q.device)
        result, log_sum = attend(query, k, v, span, options, with_lse=lse is not None)
        out.index_copy_(0, rows, result.flatten(0, 1))
        if lse is not None and log_sum is not None:
            lse.index_copy_(0, rows, log_sum.flatten(0, 1).to(lse.dtype))


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start_loc: Tensor,
    key_start_loc: Tensor,
    *,
    max_query_len: int,  # noqa: ARG001 - the lengths themselves are at hand
    max_key_len: int,  # noqa: ARG001 - likewise
    options: AttentionOptions,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Fill out and lse as `octavo_kernels.varlen_attention` says."""
    bounds = itertools.pairwise(query_start_loc.tolist()), itertools.pairwise(key_start_loc.tolist())
    for (start, stop), (key_start, key_stop) in zip(*bounds, strict=True):
        if start == stop:
            continue
        key_len = key_stop - key_start
        keys, values = (x[key_start:key_stop].transpose(0, 1).unsqueeze(0) for x in (k, v))
        span = Span.make([0], [key_len], stop - start, key_len, q.device)
        # Rows that no query sees may hold NaN, and zeroing writes: a window or a short query needs its own copy.
        if span.has_hidden_columns(options):
            keys, values = keys.clone(), values.clone()
        result, log_sum = attend(q[start:stop].unsqueeze(0), keys, values, span, options, with_lse=lse is not None)
        out[start:stop] = result[0]
        if lse is not None and log_sum is not None:
            lse[start:stop] = log_sum[0].to(lse.dtype)


def _sequences(
    starts: list[int], seq_lens: list[int], block_size: int, options: AttentionOptions
) -> Iterator[_Sequence]:
    for index, seq_len in enumerate(seq_lens):
        query_len = starts[index + 1] - starts[index]
        if query_len == 0:
            continue
        first_block = 0
        if options.window is not None:
            first_block = max(0, seq_len - query_len - options.window + 1) // block_size
        num_blocks = (seq_len + block_size - 1) // block_size - first_block
        yield _Sequence(index, starts[index], query_len, seq_len, first_block, num_blocks)


def _buckets(sequences: Iterator[_Sequence], block_bytes: int) -> Iterator[list[_Sequence]]:
    """Group sequences of one query_len, longest first, while the padding and the sum stay small."""
    ordered = sorted(sequences, key=lambda sequence: (sequence.query_len, -sequence.num_blocks))
    for _, same in itertools.groupby(ordered, key=lambda sequence: sequence.query_len):
        bucket: list[_Sequence] = []
        padding = 0
        for sequence in same:
            if bucket:
                longest = bucket[0].num_blocks
                padding += (longest - sequence.num_blocks) * block_bytes
                if padding > _PADDING_BYTES or (len(bucket) + 1) * longest * block_bytes > _BUCKET_BYTES:
                    yield bucket
                    bucket, padding = [], 0
            bucket.append(sequence)
        yield bucket


def _block_ids(block_table: Tensor, bucket: list[_Sequence]) -> Tensor:
    """Return [sequences, longest] int64 block ids; the padding points at the table's first block, or at block 0."""
    longest = bucket[0].num_blocks
    table = block_table.index_select(
        0, torch.tensor([sequence.index for sequence in bucket], device=block_table.device)
    )
    if all(sequence.first_block == 0 for sequence in bucket):
        block_ids = table[:, :longest].long()
    else:
        first = torch.tensor([sequence.first_block for sequence in bucket], device=table.device)
        columns = first[:, None] + torch.arange(longest, device=table.device)
        block_ids = table.long().gather(1, columns.clamp_(max=table.shape[1] - 1))
    if bucket[-1].num_blocks < longest:
        counts = torch.tensor([sequence.num_blocks for sequence in bucket], device=table.device)
        block_ids = block_ids.masked_fill(torch.arange(longest, device=table.device) >= counts[:, None], 0)
    return block_ids


def _rows(bucket: list[_Sequence], device: torch.device) -> Tensor:
    if len(bucket) == 1:
        return torch.arange(bucket[0].start, bucket[0].start + bucket[0].query_len, device=device)
    starts = torch.tensor([sequence.start for sequence in bucket], device=device)
    if bucket[0].query_len == 1:
        return starts
    return (starts[:, None] + torch.arange(bucket[0].query_len, device=device)).flatten()


def _gather(cache: Tensor, block_ids: Tensor, scales: Tensor | None, dtype: torch.dtype, name: str) -> Tensor:
    """Return [sequences, num_kv_heads, columns, head_dim] of a cache, scaled, in `dtype`; valid until the next call."""
    gathered = _gather_blocks(cache, block_ids, name)
    if scales is None and cache.dtype == dtype:
        return gathered
    wide = scratch(f"{name} wide", tuple(gathered.shape), dtype, cache.device)
    wide.copy_(gathered)
    return wide if scales is None else wide.mul_(_gather_blocks(scales.unsqueeze(-1), block_ids, f"{name} scales"))


def _gather_blocks(cache: Tensor, block_ids: Tensor, name: str) -> Tensor:
    num_blocks, num_heads, block_size, width = cache.shape
    num_sequences, longest = block_ids.shape
    heads = torch.arange(num_heads, device=cache.device)[None, :, None]
    shape = (num_sequences, num_heads, longest * block_size, width)
    picked = scratch(name, shape, cache.dtype, cache.device)
    row_stride = cache.stride(1) if num_heads > 1 else cache.stride(0)
    contiguous = cache.stride(2) == width and (width == 1 or cache.stride(3) == 1)
    if contiguous and row_stride and cache.stride(0) % row_stride == 0:
        # One row per (block, head): index_select then copies whole tiles, three times faster than two indices.
        per_block = cache.stride(0) // row_stride
        rows = cache.as_strided(((num_blocks - 1) * per_block + num_heads, block_size * width), (row_stride, 1))
        ids = (block_ids[:, None, :] * per_block + heads).flatten()
        torch.index_select(rows, 0, ids, out=picked.view(-1, block_size * width))
    else:
        tiles = picked.view(num_sequences, num_heads, longest, block_size, width)
        tiles.copy_(cache[block_ids[:, None, :], heads])
    return picked
