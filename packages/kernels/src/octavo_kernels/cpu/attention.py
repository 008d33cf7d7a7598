"""The attention ops of the `cpu` backend: native code over cache blocks for fp32 queries, batched torch elsewhere."""

import torch
from torch import Tensor

from octavo_kernels._dispatch import note_fallback
from octavo_kernels._options import AttentionOptions
from octavo_kernels.cpu import abi
from octavo_kernels.cpu.fallback import attention as in_torch
from octavo_kernels.cpu.launch import launch, pointer
from octavo_kernels.cpu.load import library_for

__all__ = ["paged_attention", "varlen_attention"]

_MAX_HEAD_DIM = 256


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
    op = "paged_attention"
    native = library_for(op) is not None
    if native:
        small = (query_start_loc, seq_lens, options.sinks, options.alibi_slopes, k_scale, v_scale, lse)
        reason = _unserved(q, k_cache, v_cache) or _not_addressed(block_table, small)
        if reason is not None:
            note_fallback(op, reason)
            native = False
    if not native:
        in_torch.paged_attention(
            q, k_cache, v_cache, query_start_loc, seq_lens, block_table,
            max_query_len=max_query_len, options=options, k_scale=k_scale, v_scale=v_scale, out=out, lse=lse,
        )  # fmt: skip
        return
    num_tokens, num_heads, head_dim = q.shape
    args = abi.PagedAttentionArgs(
        pointer(q), pointer(k_cache), pointer(v_cache), pointer(k_scale), pointer(v_scale),
        pointer(query_start_loc), pointer(seq_lens), pointer(block_table),
        pointer(options.sinks), pointer(options.alibi_slopes), pointer(out), pointer(lse),
        *q.stride()[:2], *out.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], block_table.stride(0),
        seq_lens.shape[0], num_heads, k_cache.shape[1], head_dim, k_cache.shape[2],
        abi.DTYPE_CODES[k_cache.dtype], options.causal, options.window or 0,
        options.scale, options.soft_cap or 0.0,
    )  # fmt: skip
    launch(
        abi.OpKind.PAGED_ATTENTION, args, num_tokens, q, k_cache, v_cache, k_scale, v_scale, query_start_loc, seq_lens,
        block_table, options.sinks, options.alibi_slopes, out, lse,
    )  # fmt: skip


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start_loc: Tensor,
    key_start_loc: Tensor,
    *,
    max_query_len: int,
    max_key_len: int,
    options: AttentionOptions,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Fill out and lse as `octavo_kernels.varlen_attention` says, in torch: the native library has no such op."""
    in_torch.varlen_attention(
        q, k, v, query_start_loc, key_start_loc,
        max_query_len=max_query_len, max_key_len=max_key_len, options=options, out=out, lse=lse,
    )  # fmt: skip


def _unserved(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    """Say what about a call the native library does not serve; None where it does."""
    head_dim = q.shape[2]
    if q.dtype != torch.float32:
        return f"q has dtype {str(q.dtype).removeprefix('torch.')}, expected float32; convert it with q.float()"
    if k_cache.dtype != v_cache.dtype or k_cache.dtype not in abi.DTYPE_CODES:
        return (
            f"the caches have dtypes {str(k_cache.dtype).removeprefix('torch.')} and "
            f"{str(v_cache.dtype).removeprefix('torch.')}, expected one of float32, bfloat16, float16 or int8 for both"
        )
    if head_dim % 16 or not 0 < head_dim <= _MAX_HEAD_DIM:
        return f"head_dim is {head_dim}, expected a multiple of 16 up to {_MAX_HEAD_DIM}; pad it"
    return None


def _not_addressed(block_table: Tensor, small: tuple[Tensor | None, ...]) -> str | None:
    """Say which layout the native library cannot address; rows of the block table may lie at any distance."""
    if block_table.shape[1] > 1 and block_table.stride(1) != 1:
        return "the elements of a row of block_table do not lie side by side; pass block_table.contiguous()"
    if any(tensor is not None and not tensor.is_contiguous() for tensor in small):
        return "indices, scales, sinks, slopes or lse are not contiguous; pass tensor.contiguous()"
    return None
