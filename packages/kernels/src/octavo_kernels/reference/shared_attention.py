"""Attention over shared blocks, as if nobody shared."""

from torch import Tensor

from octavo_kernels._options import AttentionOptions
from octavo_kernels.reference.attention import paged_attention


def shared_prefix_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    group_start_loc: Tensor,  # noqa: ARG001 - sharing changes no result
    lengths: Tensor,  # noqa: ARG001 - likewise
    *,
    max_query_len: int,
    max_group_query_len: int,  # noqa: ARG001 - likewise
    options: AttentionOptions,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    workspace: Tensor,  # noqa: ARG001 - likewise
) -> None:
    """Fill out and lse as `octavo_kernels.shared_prefix_attention` says."""
    paged_attention(
        q, k_cache, v_cache, query_start_loc, seq_lens, block_table,
        max_query_len=max_query_len, options=options, k_scale=k_scale, v_scale=v_scale, out=out, lse=lse,
    )  # fmt: skip
