"""The attention ops: their contract, their checks, and the way to a backend."""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation
from octavo_kernels._options import AttentionOptions
from octavo_kernels.recording import empty_result


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    max_query_len: int,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    batch_invariant: bool = True,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Attend from ragged queries to keys and values in cache blocks (PagedAttention, arXiv 2309.06180, section 4).

    Prefill, chunked prefill and decode are one call: the queries of a sequence are its last `query_len` positions,
    where query_len = query_start_loc[s + 1] - query_start_loc[s], so query i of them has position
    p = seq_lens[s] - query_len + i. Key j is seen when j < seq_lens[s], and, if causal, j <= p, and, with a window,
    p - window < j (and j < p + window if not causal): a window of w is w positions, the query's own included. Scores
    are made in this order: s = scale * q·k, soft cap, ALiBi, mask. Slots that no query sees may hold anything, even
    NaN.

    Args:
        q: [num_tokens, num_heads, head_dim]. Rows past query_start_loc[-1] are padding; their output is left as it was.
        k_cache: [num_blocks, num_kv_heads, block_size, head_dim], any strides but 1 in the last dimension. A floating
            dtype, or with scales also int8; it may differ from q's. num_heads is a multiple of num_kv_heads.
        v_cache: as k_cache.
        query_start_loc: [num_seqs + 1] int32, rising from 0.
        seq_lens: [num_seqs] int32, tokens in the cache, the new ones included.
        block_table: [num_seqs, max_blocks] int32; entries past the end of a sequence are not read as blocks, and may be
            any number. Entries wholly behind the window must be blocks, of whatever content.
        max_query_len: the longest query_len of the batch, or more.
        scale: factor on the scores, commonly head_dim ** -0.5.
        causal: whether a query sees no later position.
        window: number of positions that a query may look at, itself included; None for all.
        soft_cap: s becomes soft_cap * tanh(s / soft_cap).
        sinks: [num_heads] fp32, a logit per head that takes part in the softmax and has no value.
        alibi_slopes: [num_heads] fp32; slope * |p - j| is subtracted from the score (arXiv 2108.12409).
        k_scale: [num_blocks, num_kv_heads, block_size] fp32, factor on each cached key vector.
        v_scale: as k_scale, on each value vector. Both or neither are given.
        batch_invariant: whether the bits of a query's output may depend on its own keys alone: not on other sequences,
            nor on how many queries of its own come with it. Native code keeps this in any case, and the torch code for
            CPUs at some cost, which False saves. The other backends do not read it.
        out: like q; allocated when None.
        lse: [num_tokens, num_heads] fp32; receives the natural log of the softmax's denominator, sink included. A query
            that sees nothing gets output 0 and lse -inf (the sink's logit when there are sinks).
        workspace: [num_bytes] uint8, scratch memory in which Triton joins split keys, at a multiple of 16 bytes and of
            `attention_workspace` bytes; allocated per call when None, on backends that need one. Calls may share
            it if none runs beside another.

    Returns:
        out.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.
        BackendUnavailable: OCTAVO_BACKEND names a backend that cannot run here.

    """
    op = "paged_attention"
    device = _check.same_device(
        op, q=q, k_cache=k_cache, v_cache=v_cache, query_start_loc=query_start_loc, seq_lens=seq_lens,
        block_table=block_table, sinks=sinks, alibi_slopes=alibi_slopes, k_scale=k_scale, v_scale=v_scale, out=out,
        lse=lse, workspace=workspace,
    )  # fmt: skip
    options = AttentionOptions(scale, causal, window, soft_cap, sinks, alibi_slopes, batch_invariant, workspace)
    check_paged(op, q, k_cache, v_cache, query_start_loc, seq_lens, block_table, k_scale, v_scale, options)
    _check.option(op, "max_query_len", max_query_len, max_query_len >= 0, "at least 0")
    out = result_like(op, q, out)
    check_lse(op, q, lse)
    if len(seq_lens) and q.shape[0]:
        implementation(op, device)(
            q, k_cache, v_cache, query_start_loc, seq_lens, block_table,
            max_query_len=max_query_len, options=options, k_scale=k_scale, v_scale=v_scale, out=out, lse=lse,
        )  # fmt: skip
    return out


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start_loc: Tensor,
    key_start_loc: Tensor,
    *,
    max_query_len: int,
    max_key_len: int,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attend within ragged sequences whose keys and values lie side by side, without a cache.

    Positions, masks, options and lse are those of `paged_attention`, with key_len in place of seq_lens: the queries of
    a sequence are the last query_len of its key_len positions. Encoders use it with causal=False.

    Args:
        q: [num_tokens, num_heads, head_dim]; rows past query_start_loc[-1] are padding and keep their output.
        k: [num_keys, num_kv_heads, head_dim], q's dtype. num_heads is a multiple of num_kv_heads.
        v: as k.
        query_start_loc: [num_seqs + 1] int32, rising from 0.
        key_start_loc: [num_seqs + 1] int32, rising from 0.
        max_query_len: the longest query_len of the batch, or more.
        max_key_len: the longest key_len of the batch, or more.
        scale: factor on the scores.
        causal: whether a query sees no later position.
        window: number of positions that a query may look at, itself included; to both sides if not causal.
        soft_cap: s becomes soft_cap * tanh(s / soft_cap).
        alibi_slopes: [num_heads] fp32.
        sinks: [num_heads] fp32.
        out: like q; allocated when None.
        lse: [num_tokens, num_heads] fp32.

    Returns:
        out.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "varlen_attention"
    device = _check.same_device(
        op, q=q, k=k, v=v, query_start_loc=query_start_loc, key_start_loc=key_start_loc, alibi_slopes=alibi_slopes,
        sinks=sinks, out=out, lse=lse,
    )  # fmt: skip
    _check.rank(op, "q", q, ("num_tokens", "num_heads", "head_dim"))
    _check.shape(op, "k", k, ("num_keys", "num_kv_heads", q.shape[2]))
    _check.shape(op, "v", v, k.shape)
    _check.grouped_heads(op, q.shape[1], k.shape[1])
    _check.rank(op, "query_start_loc", query_start_loc, ("num_seqs + 1",))
    _check.shape(op, "key_start_loc", key_start_loc, query_start_loc.shape)
    _check.dtype(op, "query_start_loc", query_start_loc, torch.int32)
    _check.dtype(op, "key_start_loc", key_start_loc, torch.int32)
    _check.floating(op, q=q)
    _check.dtype(op, "k", k, q.dtype)
    _check.dtype(op, "v", v, q.dtype)
    _check.last_dim_contiguous(op, q=q, k=k, v=v)
    _check.option(op, "max_query_len", max_query_len, max_query_len >= 0, "at least 0")
    _check.option(op, "max_key_len", max_key_len, max_key_len >= 0, "at least 0")
    options = AttentionOptions(scale, causal, window, soft_cap, sinks, alibi_slopes)
    options.check(op, q.shape[1])
    out = result_like(op, q, out)
    check_lse(op, q, lse)
    if query_start_loc.shape[0] > 1 and q.shape[0]:
        implementation(op, device)(
            q, k, v, query_start_loc, key_start_loc,
            max_query_len=max_query_len, max_key_len=max_key_len, options=options, out=out, lse=lse,
        )  # fmt: skip
    return out


def check_paged(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    options: AttentionOptions,
) -> None:
    """Check what every op over cache blocks takes.

    Raises: ShapeError, DtypeError, OptionError.
    """
    _check.rank(op, "q", q, ("num_tokens", "num_heads", "head_dim"))
    _check.rank(op, "k_cache", k_cache, ("num_blocks", "num_kv_heads", "block_size", "head_dim"))
    num_kv_heads = k_cache.shape[1]
    _check.shape(op, "k_cache", k_cache, ("num_blocks", "num_kv_heads", "block_size", q.shape[2]))
    _check.shape(op, "v_cache", v_cache, k_cache.shape)
    _check.grouped_heads(op, q.shape[1], num_kv_heads)
    _check.rank(op, "seq_lens", seq_lens, ("num_seqs",))
    num_seqs = seq_lens.shape[0]
    _check.shape(op, "query_start_loc", query_start_loc, (num_seqs + 1,))
    _check.shape(op, "block_table", block_table, (num_seqs, "max_blocks"))
    for name, index in (("query_start_loc", query_start_loc), ("seq_lens", seq_lens), ("block_table", block_table)):
        _check.dtype(op, name, index, torch.int32)
    _check.floating(op, q=q)
    _check.last_dim_contiguous(op, q=q, k_cache=k_cache, v_cache=v_cache)
    _check_scales(op, k_cache, v_cache, k_scale, v_scale)
    options.check(op, q.shape[1])


def result_like(op: str, q: Tensor, out: Tensor | None) -> Tensor:
    """Return out after a check, or memory for it.

    Raises: ShapeError, DtypeError.
    """
    if out is None:
        return empty_result(q.shape, q.dtype, q.device)
    _check.shape(op, "out", out, q.shape)
    _check.dtype(op, "out", out, q.dtype)
    _check.last_dim_contiguous(op, out=out)
    return out


def check_lse(op: str, q: Tensor, lse: Tensor | None) -> None:
    """Check an lse that is given.

    Raises: ShapeError, DtypeError.
    """
    if lse is not None:
        _check.shape(op, "lse", lse, q.shape[:2])
        _check.dtype(op, "lse", lse, torch.float32)


def _check_scales(op: str, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    both = (k_scale is None) == (v_scale is None)
    _check.option(op, "k_scale", "given" if k_scale is not None else None, both, "both k_scale and v_scale, or neither")
    if k_scale is None or v_scale is None:
        _check.floating(op, k_cache=k_cache, v_cache=v_cache)
        return
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        _check.shape(op, name, scales, k_cache.shape[:3])
        _check.dtype(op, name, scales, torch.float32)
