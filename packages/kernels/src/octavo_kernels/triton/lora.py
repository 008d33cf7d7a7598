"""Low-rank adapters in Triton: products grouped by adapter, over the tiles of `octavo_kernels.row_groups`."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.lora import LoraPart, lora_span_inputs
from octavo_kernels.reference.lora import multiply_by_factors
from octavo_kernels.row_groups import RowGroups
from octavo_kernels.triton._launch import check_dtypes, interpreted, next_power_of_2
from octavo_kernels.triton._tiles import dot_precision

_BLOCK_K = 64


def lora_shrink(x: Tensor, a: Tensor, groups: RowGroups, ranks: Tensor, out: Tensor) -> None:
    """Fill out as `octavo_kernels.lora_shrink` says."""
    check_dtypes("lora_shrink", x=x)
    num_spans, num_tokens, max_rank = out.shape
    block_n = min(64, max(16, next_power_of_2(max_rank)))
    _shrink[(len(groups.groups), triton.cdiv(max_rank, block_n), num_spans)](
        x, a, out, groups.rows, groups.groups, ranks, num_tokens, max_rank, x.shape[1],
        lora_span_inputs(x.shape[1]), x.stride(0), *a.stride()[:2],
        BLOCK_M=groups.tile_rows, BLOCK_N=block_n, BLOCK_K=_BLOCK_K,
        WIDE_DOT=interpreted() and x.dtype == torch.bfloat16, PRECISION=dot_precision(x.dtype),
        num_warps=4, num_stages=3,
    )  # fmt: skip


def lora_expand(shrunk: Tensor, b: Tensor, groups: RowGroups, ranks: Tensor, scales: Tensor, out: Tensor) -> None:
    """Add to out as `octavo_kernels.lora_expand` says."""
    check_dtypes("lora_expand", b=b, out=out)
    num_spans, num_tokens, max_rank = shrunk.shape
    out_features = b.shape[1]
    _expand[(len(groups.groups), triton.cdiv(out_features, 64))](
        shrunk, b, out, groups.rows, groups.groups, ranks, scales, num_tokens, max_rank, out_features,
        *b.stride()[:2], out.stride(0), NUM_SPANS=num_spans, BLOCK_M=groups.tile_rows, BLOCK_N=64,
        BLOCK_K=min(64, max(16, next_power_of_2(max_rank))),
        WIDE_DOT=interpreted() and b.dtype == torch.bfloat16, PRECISION=dot_precision(b.dtype),
        num_warps=4, num_stages=2,
    )  # fmt: skip


def lora_linear(x: Tensor, parts: Sequence[LoraPart], groups: RowGroups, out: Tensor, shrunk: Tensor) -> None:
    """Add to out as `octavo_kernels.lora_linear` says."""
    for part, sums in zip(parts, shrunk, strict=True):
        lora_shrink(x, part.a, groups, part.ranks, sums)
        lora_expand(sums, part.b, groups, part.ranks, part.scales, out[:, part.columns])
        if part.factors is not None:
            multiply_by_factors(part.factors, groups, part.ranks, out[:, part.columns])


@triton.jit
def _shrink(
    x_ptr, a_ptr, out_ptr, rows_ptr, groups_ptr, ranks_ptr, num_tokens, max_rank, in_features, span_inputs,
    x_stride, a_stride_g, a_stride_r,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute a tile of one span of the first product."""
    tile = tl.program_id(0)
    adapter = tl.load(groups_ptr + tile).to(tl.int64)
    if adapter < 0:
        return
    rank = tl.load(ranks_ptr + adapter)
    first_column = tl.program_id(1) * BLOCK_N
    if first_column >= rank:
        return
    span = tl.program_id(2)
    tokens = tl.load(rows_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    live = tokens < num_tokens
    columns = first_column + tl.arange(0, BLOCK_N)
    in_columns = columns < rank
    dtype: tl.constexpr = tl.float32 if WIDE_DOT else x_ptr.dtype.element_ty
    x_rows = x_ptr + tokens[:, None] * x_stride
    a_rows = a_ptr + adapter * a_stride_g + columns.to(tl.int64)[None, :] * a_stride_r
    end = tl.minimum((span + 1) * span_inputs, in_features)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(span * span_inputs, end, BLOCK_K):
        inputs = first + tl.arange(0, BLOCK_K)
        inside = inputs < end
        x = tl.load(x_rows + inputs[None, :], mask=live[:, None] & inside[None, :], other=0.0).to(dtype)
        a = tl.load(a_rows + inputs[:, None], mask=inside[:, None] & in_columns[None, :], other=0.0).to(dtype)
        sums = tl.dot(x, a, acc=sums, input_precision=PRECISION)
    out_rows = out_ptr + (span * num_tokens + tokens)[:, None] * max_rank
    tl.store(out_rows + columns[None, :], sums, mask=live[:, None] & in_columns[None, :])


@triton.jit
def _expand(
    shrunk_ptr, b_ptr, out_ptr, rows_ptr, groups_ptr, ranks_ptr, scales_ptr, num_tokens, max_rank, out_features,
    b_stride_g, b_stride_o, out_stride, NUM_SPANS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile of the second product to out; a token is in one tile alone."""
    tile = tl.program_id(0)
    adapter = tl.load(groups_ptr + tile).to(tl.int64)
    if adapter < 0:
        return
    rank = tl.load(ranks_ptr + adapter)
    tokens = tl.load(rows_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    live = tokens < num_tokens
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = columns < out_features
    dtype: tl.constexpr = tl.float32 if WIDE_DOT else b_ptr.dtype.element_ty
    b_rows = b_ptr + adapter * b_stride_g + columns.to(tl.int64)[None, :] * b_stride_o
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, rank, BLOCK_K):
        inputs = first + tl.arange(0, BLOCK_K)
        inside = inputs < rank
        shrunk = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for span in tl.static_range(NUM_SPANS):
            rows = shrunk_ptr + (span * num_tokens + tokens)[:, None] * max_rank
            shrunk += tl.load(rows + inputs[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_rows + inputs[:, None], mask=inside[:, None] & in_columns[None, :], other=0.0).to(dtype)
        sums = tl.dot(shrunk.to(dtype), b, acc=sums, input_precision=PRECISION)
    out_rows = out_ptr + tokens[:, None] * out_stride
    mask = live[:, None] & in_columns[None, :]
    before = tl.load(out_rows + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    result = before + sums * tl.load(scales_ptr + adapter)
    tl.store(out_rows + columns[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)
