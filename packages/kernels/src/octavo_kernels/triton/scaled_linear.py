"""Products of 8-bit codes in Triton: FP8 and int8, 128 inputs at a time, as their scales lie.

A program owns BLOCK_M rows and BLOCK_N outputs. As in `weight_only`, spans of inputs are programs of their own for few
rows, and a second kernel adds their sums in order; for many rows one program adds all spans of its tile, in that order.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels._codes import SCALE_GROUP
from octavo_kernels._spans import num_spans, splits_rows
from octavo_kernels._workspace import take
from octavo_kernels.triton._tiles import sum_spans, tile_of


def scaled_linear(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    workspace: Tensor,
) -> None:
    """Fill out as `octavo_kernels.scaled_linear` says."""
    num_tokens, out_features = out.shape
    in_features = x.shape[1]
    num_blocks = triton.cdiv(in_features, SCALE_GROUP)
    spans = num_spans(out_features, num_blocks)
    split = spans > 1 and splits_rows(num_tokens)
    target = take(workspace, 0, torch.float32, spans, num_tokens, out_features)[0] if split else out
    grouped = x_scale.shape[1] > 1 or weight_scale.shape[1] > 1
    block_m, block_n, num_warps, num_stages = choose_tile(num_tokens, exact=x.dtype == torch.int8 and not grouped)
    blocks_of_outputs = len(weight_scale) not in (1, out_features)
    tiles = triton.cdiv(num_tokens, block_m) * triton.cdiv(out_features, block_n)
    _product[(tiles, spans if split else 1)](
        x, weight, x_scale, weight_scale, None if split else bias, target,
        num_tokens, out_features, in_features, triton.cdiv(num_blocks, spans), num_blocks, 1 if split else spans,
        x.stride(0), weight.stride(0), target.stride(-2),
        0 if len(x_scale) == 1 else x_scale.stride(0), 0 if x_scale.shape[1] == 1 else x_scale.stride(1),
        0 if len(weight_scale) == 1 else weight_scale.stride(0),
        0 if weight_scale.shape[1] == 1 else weight_scale.stride(1),
        GROUPED=grouped, SCALE_OUTPUTS=SCALE_GROUP if blocks_of_outputs else 1, BLOCK_K=SCALE_GROUP,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    if split:
        sum_spans(target, bias, out)


def choose_tile(num_tokens: int, *, exact: bool) -> tuple[int, int, int, int]:
    """Return rows and outputs of a tile, warps and stages: few rows read the weight once, many use wgmma.

    `exact`: whether sums are int32, to which each product is added where it is made.
    """
    if num_tokens <= 16:
        return 16, 64, 4, 4
    if splits_rows(num_tokens):
        return 32, 64, 4, 4
    if num_tokens <= 64:
        return 64, 64, 4, 4
    return (128, 128, 8, 3) if exact else (128, 64, 8, 4)  # others keep one more sum in registers


@triton.jit
def _product(
    x_ptr, weight_ptr, x_scale_ptr, weight_scale_ptr, bias_ptr, out_ptr,
    num_tokens, out_features, in_features, span_blocks, num_blocks, num_spans,
    x_stride, weight_stride, out_stride, xs_stride_t, xs_stride_g, ws_stride_o, ws_stride_g,
    GROUPED: tl.constexpr, SCALE_OUTPUTS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute one tile of one span, or of all; see the file's docstring for the order."""
    row_tile, column_tile = tile_of(
        tl.program_id(0), tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(out_features, BLOCK_N), 8
    )  # fmt: skip
    rows = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < num_tokens
    in_columns = columns < out_features
    x_rows = x_ptr + rows[:, None] * x_stride
    weight_rows = weight_ptr + columns.to(tl.int64)[None, :] * weight_stride
    x_scales = x_scale_ptr + rows * xs_stride_t
    weight_scales = weight_scale_ptr + columns // SCALE_OUTPUTS * ws_stride_o
    whole: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    kind: tl.constexpr = tl.int32 if whole and not GROUPED else tl.float32
    first_span = tl.program_id(1)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for span in range(first_span, first_span + num_spans):
        sums = tl.zeros([BLOCK_M, BLOCK_N], kind)
        for block in range(span * span_blocks, tl.minimum((span + 1) * span_blocks, num_blocks)):
            inputs = block * BLOCK_K + tl.arange(0, BLOCK_K)
            inside = inputs < in_features
            x = tl.load(x_rows + inputs[None, :], mask=in_rows[:, None] & inside[None, :], other=0.0)
            weight = tl.load(weight_rows + inputs[:, None], mask=inside[:, None] & in_columns[None, :], other=0.0)
            if whole and not GROUPED:
                sums = tl.dot(x, weight, acc=sums, out_dtype=tl.int32)
            elif GROUPED:
                products = tl.dot(x, weight, out_dtype=tl.int32 if whole else tl.float32).to(tl.float32)
                x_factors = tl.load(x_scales + block * xs_stride_g, mask=in_rows, other=0.0)
                weight_factors = tl.load(weight_scales + block * ws_stride_g, mask=in_columns, other=0.0)
                sums += products * x_factors[:, None] * weight_factors[None, :]
            else:
                sums += tl.dot(x, weight)
        if GROUPED:
            total += sums
        else:
            x_factors = tl.load(x_scales, mask=in_rows, other=0.0)
            weight_factors = tl.load(weight_scales, mask=in_columns, other=0.0)
            total += sums.to(tl.float32) * x_factors[:, None] * weight_factors[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    out_rows = (first_span * num_tokens + rows) * out_stride
    mask = in_rows[:, None] & in_columns[None, :]
    tl.store(out_ptr + out_rows[:, None] + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)
