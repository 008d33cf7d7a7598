"""Products by integer weights in Triton (W4A16, W8A16): codes are unpacked into the operand of a tensor core.

A program owns BLOCK_M rows and BLOCK_N outputs. It walks blocks of inputs (see `octavo_kernels.int_weight`): one load
of 16 rows of words is all that a block has of these outputs, and each shift of them is 16 neighbouring inputs. Sums
over a group are of whole numbers times x; the group's scale is applied to them in fp32.

Few rows take 16 inputs at a time, so that a shift of the words is an operand where it stands: what is put together from
several shifts goes through shared memory in Triton 3.6. Many rows take a group's, for fewer and longer products; the
tensor cores take 16 inputs after 16 either way.

Few rows are a matter of reading the weight: the spans of inputs are programs of their own, and a second kernel adds
their sums in order. For many rows one program adds all spans of its tile, in the same order.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels._spans import num_spans, splits_rows
from octavo_kernels._workspace import take
from octavo_kernels.int_weight import ROWS, IntWeight
from octavo_kernels.triton._launch import check_dtypes, interpreted
from octavo_kernels.triton._tiles import dot_precision, sum_spans, tile_of
from octavo_kernels.triton._tuned import tuned

_ROWS = tl.constexpr(ROWS)


TUNABLE = ("columns", "num_warps", "num_stages")
"""What a tuned configuration says of a tile; rows and inputs stay, and with them a row's bits."""


class Tile(NamedTuple):
    """How a product is cut: rows and outputs of a tile, inputs that are unpacked at once, warps and stages."""

    rows: int
    columns: int
    inputs: int
    num_warps: int
    num_stages: int


def weight_only_linear(
    x: Tensor, weight: IntWeight, bias: Tensor | None, out: Tensor, workspace: Tensor, tile: Tile | None = None
) -> None:
    """Fill out as `octavo_kernels.weight_only_linear` says; the tile is the one for the call unless it is given."""
    check_dtypes("weight_only_linear", x=x)
    num_tokens, out_features = out.shape
    spans = num_spans(out_features, weight.num_blocks)
    split = spans > 1 and splits_rows(num_tokens)
    target = take(workspace, 0, torch.float32, spans, num_tokens, out_features)[0] if split else out
    tile = tile or _tuned_tile(x, weight)
    tiles = triton.cdiv(num_tokens, tile.rows) * triton.cdiv(out_features, tile.columns)
    _product[(tiles, spans if split else 1)](
        x, weight.words, weight.scales, weight.zeros, weight.minimums, None if split else bias, target,
        num_tokens, out_features, weight.in_features, triton.cdiv(weight.num_blocks, spans), weight.num_blocks,
        x.stride(0), weight.words.stride(0), target.stride(-2), 1 if split else spans, weight.group_size,
        BITS=weight.bits, BLOCK_INPUTS=weight.block_inputs, STEP=step_inputs(weight), INPUTS=tile.inputs,
        ZERO_POINT=weight.zero_point, BLOCK_M=tile.rows, BLOCK_N=tile.columns,
        WIDE_DOT=interpreted() and x.dtype == torch.bfloat16, PRECISION=dot_precision(x.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if split:
        sum_spans(target, bias, out)


def choose_tile(num_tokens: int, weight: IntWeight, dtype: torch.dtype) -> Tile:
    """Return the tile of a product: few rows read the weight once, many take wgmma's 64 rows or twice that.

    With groups smaller than a block several sums are in flight, so that tiles are smaller, lest registers spill.
    """
    step = step_inputs(weight)
    if dtype == torch.float32:
        return Tile(16, 32, step, 4, 3)
    fine = step < weight.block_inputs
    if num_tokens <= 16:
        return Tile(16, 64, ROWS, 4, 4)
    if splits_rows(num_tokens):
        return Tile(32, 32 if fine else 64, ROWS, 4, 3)
    return Tile(64, 64, step, 8, 3) if fine or num_tokens <= 64 else Tile(128, 64, step, 8, 3)


def tuning_shape(weight: IntWeight) -> str:
    """Return what distinguishes launches beside dtype and rows."""
    fine = " fine" if step_inputs(weight) < weight.block_inputs else ""
    return f"int{weight.bits}{fine} {weight.out_features}x{weight.in_features}"


def _tuned_tile(x: Tensor, weight: IntWeight) -> Tile:
    default, shape = choose_tile(len(x), weight, x.dtype), tuning_shape(weight)
    return tuned("weight_only_linear", default, TUNABLE, rows=len(x), shape=shape, dtype=x.dtype, device=x.device)


def step_inputs(weight: IntWeight) -> int:
    """Return after how many inputs scales are applied: a group's, or a block's where groups are larger."""
    one_group = weight.group_size == weight.in_features
    return weight.block_inputs if one_group else min(weight.group_size, weight.block_inputs)


@triton.jit
def _numbers(
    words, first_field, offset, BITS: tl.constexpr, INPUTS: tl.constexpr, dtype: tl.constexpr, WIDE_DOT: tl.constexpr
):  # fmt: skip
    """Return fields of words less an offset: INPUTS neighbouring inputs of every output, in `dtype`, or in fp32.

    Four bits become a number by standing in the last bits of 1024 (fp16) or 128 (bf16): cheaper than a conversion.
    """
    if INPUTS == _ROWS:
        codes = (words >> (first_field * BITS)) & ((1 << BITS) - 1)
    else:
        shifts = (first_field + tl.arange(0, INPUTS // _ROWS)) * BITS
        codes = (words[None, :, :] >> shifts[:, None, None]) & ((1 << BITS) - 1)
        codes = tl.reshape(codes, [INPUTS, words.shape[1]])
    if BITS == 4 and dtype == tl.float16:
        return (codes | 0x6400).to(tl.int16).to(dtype, bitcast=True) - (1024.0 + offset).to(dtype)
    if BITS == 4 and dtype == tl.bfloat16:
        above = (codes | 0x4300).to(tl.int16).to(dtype, bitcast=True)
        return above.to(tl.float32) - (128.0 + offset) if WIDE_DOT else above - (128.0 + offset).to(dtype)
    return (codes.to(tl.float32) - offset).to(tl.float32 if WIDE_DOT else dtype)


@triton.jit
def _product(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, minimums_ptr, bias_ptr, out_ptr,
    num_tokens, out_features, in_features, span_blocks, num_blocks, x_stride, word_stride, out_stride,
    num_spans, group_size,
    BITS: tl.constexpr, BLOCK_INPUTS: tl.constexpr, STEP: tl.constexpr,
    INPUTS: tl.constexpr, ZERO_POINT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE_DOT: tl.constexpr, PRECISION: tl.constexpr,
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
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    first_span = tl.program_id(1)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for span in range(first_span, first_span + num_spans):
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for block in range(span * span_blocks, tl.minimum((span + 1) * span_blocks, num_blocks)):
            word_rows = (tl.arange(0, _ROWS) + block * _ROWS)[:, None]
            words = tl.load(words_ptr + word_rows * word_stride + columns[None, :], mask=in_columns[None, :], other=0)
            for step in tl.static_range(BLOCK_INPUTS // STEP):
                first_input = block * BLOCK_INPUTS + step * STEP
                # Inputs that fill the last block up belong to no group.
                in_group = columns < tl.where(first_input < in_features, out_features, 0)
                group = first_input // group_size
                if STEP < BLOCK_INPUTS:
                    group = block * (BLOCK_INPUTS // STEP) + step
                places = group * word_stride + columns
                offset = tl.full([1, 1], ZERO_POINT, tl.float32)
                if zeros_ptr is not None:
                    offset = tl.load(zeros_ptr + places, mask=in_group, other=0).to(tl.float32)[None, :]
                products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                x_sums = tl.zeros([BLOCK_M], tl.float32)
                for part in tl.static_range(STEP // INPUTS):
                    inputs = first_input + part * INPUTS + tl.arange(0, INPUTS)
                    mask = in_rows[:, None] & (inputs < in_features)[None, :]
                    x = tl.load(x_rows + inputs[None, :], mask=mask, other=0.0)
                    if WIDE_DOT:
                        x = x.to(tl.float32)
                    field = (step * STEP + part * INPUTS) // _ROWS
                    numbers = _numbers(words, field, offset, BITS, INPUTS, dtype, WIDE_DOT)
                    products = tl.dot(x, numbers, acc=products, input_precision=PRECISION)
                    if minimums_ptr is not None:
                        x_sums += tl.sum(x.to(tl.float32), 1)
                scales = tl.load(scales_ptr + places, mask=in_group, other=0.0).to(tl.float32)
                sums += products * scales[None, :]
                if minimums_ptr is not None:
                    minimums = tl.load(minimums_ptr + places, mask=in_group, other=0.0).to(tl.float32)
                    sums += x_sums[:, None] * minimums[None, :]
        total += sums
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    out_rows = (first_span * num_tokens + rows) * out_stride
    mask = in_rows[:, None] & in_columns[None, :]
    tl.store(out_ptr + out_rows[:, None] + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)
