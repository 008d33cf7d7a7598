"""Attention of short queries in CUDA C++: between the plan on the device and the join of parts, which are Triton's.

Sequences whose queries are too many for it, and those that find no slots in the workspace, are Triton's in the same
call; calls that it does not serve at all are Triton's too, with a warning and a count.
"""

import math

import torch
from torch import Tensor

from octavo_kernels._dispatch import note_served_by_triton
from octavo_kernels._options import AttentionOptions
from octavo_kernels._split_workspace import SPLIT_ROWS
from octavo_kernels.cuda.load import ops
from octavo_kernels.triton import attention as in_triton
from octavo_kernels.triton._attention_call import AttentionCall
from octavo_kernels.triton._launch import check_dtypes
from octavo_kernels.triton.split_attention import Cut, cut_keys, join_parts

_TILE_ROWS = 16  # csrc_cuda/attention.h
_ALIGNMENT = 16
_CODES = (torch.int8, torch.float8_e4m3fn)

# The kernels that there are: head sizes by the dtypes of queries and of the cache.
_HEAD_DIMS: dict[tuple[torch.dtype, torch.dtype], tuple[int, ...]] = {
    (torch.bfloat16, torch.bfloat16): (64, 128, 256),
    (torch.float16, torch.float16): (64, 128),
    (torch.float32, torch.float32): (64, 128),
    **{(torch.bfloat16, codes): (64, 128) for codes in _CODES},
}


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
    check_dtypes("paged_attention", q=q)
    if not max_query_len:
        return
    call = AttentionCall(
        q, k_cache, v_cache, query_start_loc, seq_lens, options, out, lse, block_table, k_scale, v_scale
    )
    reason = why_not(call)
    if reason is not None:
        note_served_by_triton("paged_attention", reason)
        in_triton.attend(call, max_query_len)
    else:
        # As many queries as Triton splits keys for. Each tile of rows reads the keys, which its L2 then has.
        split_len = min(max_query_len, SPLIT_ROWS // call.group)
        cut = cut_keys(call, split_len, options.workspace, _TILE_ROWS)
        _split(call, cut)
        join_parts(call, cut)
        if max_query_len > split_len or not cut.split.complete:
            in_triton.prefill(call, max_query_len, cut.plan)


def why_not(call: AttentionCall) -> str | None:
    """Say why a call is not for this kernel and what to do, or None."""
    q, k, v, options = call.q, call.k, call.v, call.options
    if options.batch_invariant:
        return "batch_invariant is True, and long queries, which are Triton's, are rounded otherwise; pass False"
    head_dims = _HEAD_DIMS.get((q.dtype, k.dtype), ())
    if q.shape[2] not in head_dims or v.dtype != k.dtype:
        return (
            f"q is {_name(q)}, k_cache {_name(k)}, v_cache {_name(v)}, and head_dim {q.shape[2]}, expected one of "
            f"{_known()}; let Triton serve"
        )
    if call.group > _TILE_ROWS:
        return f"{call.group} query heads share a key head, expected at most {_TILE_ROWS}; let Triton serve"
    for name, tensor in (("q", q), ("k_cache", k), ("v_cache", v)):
        places = (tensor.data_ptr(), *(stride * tensor.element_size() for stride in tensor.stride()[:-1]))
        if tensor.stride(-1) != 1 or any(place % _ALIGNMENT for place in places):
            return f"{name} has vectors that begin at no multiple of {_ALIGNMENT} bytes; pass one that is aligned"
    return None


def _split(call: AttentionCall, cut: Cut) -> None:
    """Walk over the pieces of a plan, and leave a state of each row for each piece."""
    options = call.options
    late = options.soft_cap is not None or options.alibi_slopes is not None
    assert call.block_table is not None
    with torch.cuda.device(call.q.device):
        ops().split_keys(
            call.q, call.k, call.v, call.query_start_loc, call.key_lens, call.block_table, options.alibi_slopes,
            call.k_scale, call.v_scale, cut.plan, cut.parts, cut.sums,
            options.scale if late else options.scale * math.log2(math.e), options.soft_cap or 0.0, options.window or 0,
            options.causal, cut.num_rows, cut.width, cut.num_programs, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _known() -> str:
    return ", ".join(
        f"{str(query).removeprefix('torch.')} by {str(cache).removeprefix('torch.')} with {'/'.join(map(str, dims))}"
        for (query, cache), dims in _HEAD_DIMS.items()
    )
