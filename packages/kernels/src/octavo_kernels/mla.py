"""mla_decode: multi-head latent attention over a cache of latent vectors."""

import math

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation
from octavo_kernels.attention import check_lse, result_like


def mla_decode(
    q_nope: Tensor,
    q_pe: Tensor,
    ckv_cache: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attend from queries in latent space to cached latent vectors, which all heads share (MLA, arXiv 2405.04434).

    A cached vector is a latent c of latent_dim numbers and a rotated key r of rope_dim. Head h's score is scale *
    (q_nope[h]·c + q_pe[h]·r), and its value is c: queries are multiplied by the keys' up-projection beforehand, results
    by the values' afterwards (section 2.1.2, "absorbed"). Query i of a sequence is at position seq_len - query_len + i
    and sees nothing later. A query's bits depend on its own keys alone; in Triton each query and 16 of its heads are
    one program's work, for any length of the sequence.

    Args:
        q_nope: [num_tokens, num_heads, latent_dim]; rows past query_start_loc[-1] are padding and keep their output.
        q_pe: [num_tokens, num_heads, rope_dim], q_nope's dtype.
        ckv_cache: [num_blocks, block_size, latent_dim + rope_dim], a floating dtype; unwritten slots may hold NaN.
        query_start_loc: [num_seqs + 1] int32, rising from 0.
        seq_lens: [num_seqs] int32, tokens in the cache, the new ones included.
        block_table: [num_seqs, max_blocks] int32; entries past the end of a sequence may be any number.
        scale: factor on the scores.
        out: like q_nope; allocated when None.
        lse: [num_tokens, num_heads] fp32; natural log of the softmax's denominator, -inf where a query sees nothing.

    Returns:
        out: sums of latent vectors, 0 where a query sees nothing.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "mla_decode"
    device = _check.same_device(
        op, q_nope=q_nope, q_pe=q_pe, ckv_cache=ckv_cache, query_start_loc=query_start_loc, seq_lens=seq_lens,
        block_table=block_table, out=out, lse=lse,
    )  # fmt: skip
    _check.rank(op, "q_nope", q_nope, ("num_tokens", "num_heads", "latent_dim"))
    _check.shape(op, "q_pe", q_pe, (*q_nope.shape[:2], "rope_dim"))
    width = q_nope.shape[2] + q_pe.shape[2]
    _check.shape(op, "ckv_cache", ckv_cache, ("num_blocks", "block_size", width))
    _check.rank(op, "seq_lens", seq_lens, ("num_seqs",))
    _check.shape(op, "query_start_loc", query_start_loc, (len(seq_lens) + 1,))
    _check.shape(op, "block_table", block_table, (len(seq_lens), "max_blocks"))
    for name, index in (("query_start_loc", query_start_loc), ("seq_lens", seq_lens), ("block_table", block_table)):
        _check.dtype(op, name, index, torch.int32)
    _check.floating(op, q_nope=q_nope, ckv_cache=ckv_cache)
    _check.dtype(op, "q_pe", q_pe, q_nope.dtype)
    _check.last_dim_contiguous(op, q_nope=q_nope, q_pe=q_pe, ckv_cache=ckv_cache)
    _check.option(op, "scale", scale, math.isfinite(scale), "a finite number")
    out = result_like(op, q_nope, out)
    check_lse(op, q_nope, lse)
    if len(seq_lens) and len(q_nope):
        implementation(op, device)(
            q_nope, q_pe, ckv_cache, query_start_loc, seq_lens, block_table, scale=scale, out=out, lse=lse
        )
    return out
