"""Latent attention in Triton: a program owns one query and BLOCK_H of its heads, and walks over the sequence.

Each tile of cached vectors is read once, as keys and, in its latent part, as values. Heads share keys, so that the rows
of the products are heads. FlashAttention-2 (arXiv 2307.08691, algorithm 1); the softmax is kept in base 2.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.triton._attend import empty_state, find_sequence, finish
from octavo_kernels.triton._launch import check_dtypes, interpreted, next_power_of_2


def mla_decode(
    q_nope: Tensor,
    q_pe: Tensor,
    ckv_cache: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Fill out and lse as `octavo_kernels.mla_decode` says."""
    check_dtypes("mla_decode", q_nope=q_nope)
    num_tokens, num_heads, latent_dim = q_nope.shape
    num_seqs, rope_dim = len(seq_lens), q_pe.shape[2]
    wide = q_nope.dtype == torch.float32
    _attend[(num_tokens + num_seqs, triton.cdiv(num_heads, 16))](
        q_nope, q_pe, ckv_cache, query_start_loc, seq_lens, block_table, out, lse,
        scale * math.log2(math.e), num_seqs, num_heads, *q_nope.stride()[:2], *q_pe.stride()[:2],
        *ckv_cache.stride()[:2], block_table.stride(0), *out.stride()[:2], *((0, 0) if lse is None else lse.stride()),
        LATENT=latent_dim, ROPE=rope_dim, BLOCK_SIZE=ckv_cache.shape[1], BLOCK_H=16, BLOCK_N=16 if wide else 32,
        BLOCK_L=max(16, next_power_of_2(latent_dim)), BLOCK_R=max(16, next_power_of_2(rope_dim)),
        WIDE_DOT=interpreted() and q_nope.dtype == torch.bfloat16, num_warps=4, num_stages=1 if wide else 2,
    )  # fmt: skip


@triton.jit
def _attend(
    q_ptr, pe_ptr, ckv_cache, query_start_loc, seq_lens, block_table, out_ptr, lse_ptr, factor, num_seqs, num_heads,
    q_stride_t, q_stride_h, pe_stride_t, pe_stride_h, ckv_stride_b, ckv_stride_o, table_stride,
    out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
    LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, WIDE_DOT: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_H heads of one query."""
    # With blocks of one query a sequence has one more than it has queries, as `find_sequence` deals them out.
    block = tl.program_id(0)
    sequence = find_sequence(query_start_loc, block, num_seqs, 1)
    start = tl.load(query_start_loc + sequence)
    query_len = tl.load(query_start_loc + sequence + 1) - start
    query = block - start - sequence
    if query >= query_len:
        return
    num_keys = tl.load(seq_lens + sequence) - query_len + query + 1
    token = (start + query).to(tl.int64)
    table_row = block_table + sequence.to(tl.int64) * table_stride

    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    latent = tl.arange(0, BLOCK_L)
    rope = tl.arange(0, BLOCK_R)
    live = heads < num_heads
    q_mask = live[:, None] & (latent < LATENT)[None, :]
    pe_mask = live[:, None] & (rope < ROPE)[None, :]
    q = tl.load(q_ptr + token * q_stride_t + heads[:, None] * q_stride_h + latent[None, :], mask=q_mask, other=0.0)
    pe = tl.load(pe_ptr + token * pe_stride_t + heads[:, None] * pe_stride_h + rope[None, :], mask=pe_mask, other=0.0)
    if WIDE_DOT:
        q = q.to(tl.float32)
        pe = pe.to(tl.float32)

    accumulator, row_max, row_sum = empty_state(BLOCK_H, BLOCK_L)
    for first_key in range(0, num_keys, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        # Later slots may hold NaN, so they are not read.
        present = keys < num_keys
        block_ids = tl.load(table_row + keys // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
        places = ckv_cache + block_ids * ckv_stride_b + (keys % BLOCK_SIZE) * ckv_stride_o
        c_mask = present[:, None] & (latent < LATENT)[None, :]
        c = tl.load(places[:, None] + latent[None, :], mask=c_mask, other=0.0).to(q.dtype)
        r_mask = present[:, None] & (rope < ROPE)[None, :]
        r = tl.load(places[:, None] + LATENT + rope[None, :], mask=r_mask, other=0.0).to(q.dtype)
        scores = tl.dot(pe, tl.trans(r), input_precision="ieee")
        scores = tl.dot(q, tl.trans(c), scores, input_precision="ieee") * factor
        scores = tl.where(present[None, :], scores, float("-inf"))
        # The first key is there, so the maximum is finite from the first tile on.
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = tl.fma(row_sum, decay, tl.sum(weights, 1))
        accumulator = tl.dot(weights.to(q.dtype), c, accumulator * decay[:, None], input_precision="ieee")
        row_max = new_max
    out_rows = token * out_stride_t + heads * out_stride_h
    lse_rows = token * lse_stride_t + heads * lse_stride_h
    finish(accumulator, row_max, row_sum, None, heads, out_ptr, lse_ptr, out_rows, lse_rows, live, LATENT, BLOCK_L)
