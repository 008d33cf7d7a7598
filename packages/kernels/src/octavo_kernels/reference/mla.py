"""Latent attention, one sequence at a time, as attention of many heads to one."""

import torch
from torch import Tensor

from octavo_kernels._options import AttentionOptions
from octavo_kernels.reference._precision import widen
from octavo_kernels.reference.attention import attend_sequence
from octavo_kernels.reference.cache_ops import sequence_slots


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
    starts, options = query_start_loc.tolist(), AttentionOptions(scale, causal=True)
    q = widen(torch.cat([q_nope, q_pe], dim=-1))
    for sequence, seq_len in enumerate(seq_lens.tolist()):
        rows = slice(starts[sequence], starts[sequence + 1])
        block_ids, offsets = sequence_slots(block_table[sequence], seq_len, ckv_cache.shape[1])
        keys = widen(ckv_cache[block_ids, offsets]).to(q.dtype)[:, None]  # [seq_len, 1, latent_dim + rope_dim]
        result, log_sum = attend_sequence(q[rows], keys, keys[..., : q_nope.shape[2]], options)
        out[rows] = result.to(out.dtype)
        if lse is not None:
            lse[rows] = log_sum.to(lse.dtype)
