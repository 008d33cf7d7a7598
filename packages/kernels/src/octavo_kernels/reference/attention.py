"""Attention, one sequence at a time, with the whole score matrix in memory."""

import torch
from torch import Tensor

from octavo_kernels._options import AttentionOptions
from octavo_kernels.reference._precision import widen
from octavo_kernels.reference.cache_ops import sequence_slots


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    max_query_len: int,  # noqa: ARG001 - a launch bound; there is no launch here
    options: AttentionOptions,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Fill out and lse as `octavo_kernels.paged_attention` says."""
    starts = query_start_loc.tolist()
    for sequence, seq_len in enumerate(seq_lens.tolist()):
        rows = slice(starts[sequence], starts[sequence + 1])
        block_ids, offsets = sequence_slots(block_table[sequence], seq_len, k_cache.shape[2])
        k, v = widen(k_cache[block_ids, :, offsets]), widen(v_cache[block_ids, :, offsets])
        if k_scale is not None and v_scale is not None:
            k = k * k_scale[block_ids, :, offsets].unsqueeze(-1)
            v = v * v_scale[block_ids, :, offsets].unsqueeze(-1)
        _fill(q, k, v, rows, options, out, lse)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start_loc: Tensor,
    key_start_loc: Tensor,
    *,
    max_query_len: int,  # noqa: ARG001 - a launch bound; there is no launch here
    max_key_len: int,  # noqa: ARG001 - likewise
    options: AttentionOptions,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Fill out and lse as `octavo_kernels.varlen_attention` says."""
    starts, key_starts = query_start_loc.tolist(), key_start_loc.tolist()
    for sequence in range(len(starts) - 1):
        rows = slice(starts[sequence], starts[sequence + 1])
        keys = slice(key_starts[sequence], key_starts[sequence + 1])
        _fill(q, widen(k[keys]), widen(v[keys]), rows, options, out, lse)


def _fill(
    q: Tensor, k: Tensor, v: Tensor, rows: slice, options: AttentionOptions, out: Tensor, lse: Tensor | None
) -> None:
    result, log_sum = attend_sequence(widen(q[rows]), k.to(widen(q).dtype), v.to(widen(q).dtype), options)
    out[rows] = result.to(out.dtype)
    if lse is not None:
        lse[rows] = log_sum.to(lse.dtype)


def attend_sequence(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Return out [query_len, num_heads, head_dim] and lse [query_len, num_heads] of one sequence."""
    query_len, num_heads, _ = q.shape
    key_len, num_kv_heads, _ = k.shape
    key_positions = torch.arange(key_len, device=q.device)
    query_positions = torch.arange(key_len - query_len, key_len, device=q.device)
    distance = query_positions[:, None] - key_positions[None, :]
    visible = _visible(distance, options)
    # A slot that no query sees may hold NaN, which a probability of 0 would not silence.
    seen = visible.any(0)[:, None, None]
    k, v = (torch.where(seen, x, 0.0).repeat_interleave(num_heads // num_kv_heads, dim=1) for x in (k, v))

    scores = options.scale * torch.einsum("qhd,khd->hqk", q, k)
    if options.soft_cap is not None:
        scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
    if options.alibi_slopes is not None:
        scores = scores - options.alibi_slopes.to(scores.dtype)[:, None, None] * distance.abs()
    scores = scores.masked_fill(~visible, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.to(scores.dtype)[:, None, None].expand(num_heads, query_len, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None])
    return torch.einsum("hqk,khd->qhd", weights[..., :key_len], v), lse.T


def _visible(distance: Tensor, options: AttentionOptions) -> Tensor:
    """Return which keys each query sees; distance is the query's position minus the key's."""
    visible = distance >= 0 if options.causal else torch.ones_like(distance, dtype=torch.bool)
    if options.window is not None:
        visible = visible & (distance.abs() < options.window)
    return visible
