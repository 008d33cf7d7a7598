"""What the matrix products share: which tile a program computes, and sums of spans in their order."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256


def dot_precision(dtype: torch.dtype) -> str:
    """Return how products of a dtype are taken: fp32 as three products of tf32 each, but where only its own form is."""
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


def sum_spans(partial: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Fill out with the sums of partial [num_spans, num_tokens, out_features] over the spans, plus the bias."""
    num_spans, num_tokens, out_features = partial.shape
    _sum_spans[(triton.cdiv(out_features, _BLOCK), num_tokens)](
        partial, bias, out, num_tokens, out_features, out.stride(0), NUM_SPANS=num_spans, BLOCK=_BLOCK, num_warps=4
    )


@triton.jit
def _sum_spans(
    partial, bias, out, num_tokens, out_features, out_stride, NUM_SPANS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(1).to(tl.int64)
    mask = columns < out_features
    total = tl.zeros([BLOCK], tl.float32)
    for span in tl.static_range(NUM_SPANS):
        total += tl.load(partial + (span * num_tokens + token) * out_features + columns, mask=mask, other=0.0)
    if bias is not None:
        total += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + columns, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def tile_of(program, num_row_tiles, num_column_tiles, GROUP_ROWS: tl.constexpr):
    """Return the row and the column of a program's tile: GROUP_ROWS tiles in turn share columns, then in L2."""
    in_group = GROUP_ROWS * num_column_tiles
    first_row = program // in_group * GROUP_ROWS
    height = tl.minimum(num_row_tiles - first_row, GROUP_ROWS)
    place = program % in_group
    return first_row + place % height, place // height
