"""Attention over cache blocks and over ragged keys, whole buckets of sequences at a time.

A bucket's blocks are gathered by one index per layer, and its scores are one batched product. Grouped heads are rows of
the same product, so keys are never repeated.

With `batch_invariant` the products are cut into tiles of one size. Without it the result of a sequence may change in
its last bits with its neighbours: the padded length and the number of rows decide how the matrix library orders its
sums.
"""

import itertools

import torch
from torch import Tensor

from octavo_kernels._options import AttentionOptions
from octavo_kernels.cpu.fallback.attend import Span, attend, product_dtype
from octavo_kernels.cpu.fallback.attend_in_tiles import attend_in_tiles
from octavo_kernels.cpu.fallback.plan import Bucket, plan_step
from octavo_kernels.cpu.fallback.scratch import scratch


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
    block_bytes = k_cache[0].numel() * k_cache.element_size()
    buckets = plan_step(
        query_start_loc,
        seq_lens,
        block_table,
        block_size=k_cache.shape[2],
        block_bytes=block_bytes,
        window=None if options.batch_invariant else options.window,  # tiles lie at absolute positions
    )
    attend_bucket = attend_in_tiles if options.batch_invariant else attend
    for bucket in buckets:
        rows, span = bucket.rows, bucket.span
        query = q.index_select(0, rows).view(bucket.num_sequences, -1, *q.shape[1:])
        dtype = product_dtype(q.dtype, query.shape[1], options, with_lse=lse is not None)
        k, v = _gather(k_cache, bucket, k_scale, dtype, "k"), _gather(v_cache, bucket, v_scale, dtype, "v")
        result, log_sum = attend_bucket(query, k, v, span, options, with_lse=lse is not None)
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


def _gather(cache: Tensor, bucket: Bucket, scales: Tensor | None, dtype: torch.dtype, name: str) -> Tensor:
    """Return [sequences, num_kv_heads, columns, head_dim] of a cache, scaled, in `dtype`; valid until the next call."""
    gathered = _gather_blocks(cache, bucket, name)
    if scales is None and cache.dtype == dtype:
        return gathered
    wide = scratch(f"{name} wide", tuple(gathered.shape), dtype, cache.device)
    wide.copy_(gathered)
    return wide if scales is None else wide.mul_(_gather_blocks(scales.unsqueeze(-1), bucket, f"{name} scales"))


def _gather_blocks(cache: Tensor, bucket: Bucket, name: str) -> Tensor:
    num_blocks, num_heads, block_size, width = cache.shape
    num_sequences, longest = bucket.block_ids.shape
    shape = (num_sequences, num_heads, longest * block_size, width)
    picked = scratch(name, shape, cache.dtype, cache.device)
    row_stride = cache.stride(1) if num_heads > 1 else cache.stride(0)
    contiguous = cache.stride(2) == width and (width == 1 or cache.stride(3) == 1)
    if contiguous and row_stride and cache.stride(0) % row_stride == 0:
        # One row per (block, head): index_select then copies whole tiles, three times faster than two indices.
        per_block = cache.stride(0) // row_stride
        rows = cache.as_strided(((num_blocks - 1) * per_block + num_heads, block_size * width), (row_stride, 1))
        torch.index_select(rows, 0, bucket.tile_rows(per_block, num_heads), out=picked.view(-1, block_size * width))
    else:
        tiles = picked.view(num_sequences, num_heads, longest, block_size, width)
        heads = torch.arange(num_heads, device=cache.device)[None, :, None]
        tiles.copy_(cache[bucket.block_ids[:, None, :], heads])
    return picked
