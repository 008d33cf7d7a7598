"""A mixture of experts in Triton: rows sorted by expert, two grouped products, and the sum of each token's experts.

A row is a pair of a token and one of its experts, token * top_k + place; see `octavo_kernels.row_groups` for its tiles.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels._workspace import take
from octavo_kernels.moe import moe_tile_rows
from octavo_kernels.row_groups import num_row_tiles
from octavo_kernels.triton._launch import check_dtypes, interpreted, next_power_of_2
from octavo_kernels.triton._tiles import dot_precision, tile_of
from octavo_kernels.triton._tuned import tuned
from octavo_kernels.triton.row_groups import group_rows

_BLOCK_K = 64  # of every product, so that the order of its sums does not follow the batch
_COLUMNS = 64

TUNABLE = ("columns", "num_warps", "num_stages")
"""What a tuned configuration says of a tile; rows and inputs stay, and with them a row's bits."""


class Tile(NamedTuple):
    """How both products are cut: rows and outputs of a tile, warps and stages."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def fused_moe(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str,
    out: Tensor,
    workspace: Tensor,
    tile: Tile | None = None,
) -> None:
    """Fill out as `octavo_kernels.fused_moe` says; the tile is the one for the call unless it is given."""
    check_dtypes("fused_moe", x=x)
    num_tokens, hidden = x.shape
    num_experts, _, intermediate = w2.shape
    top_k = topk_ids.shape[1]
    num_rows = num_tokens * top_k
    block_m = moe_tile_rows(num_rows, num_experts)
    num_tiles = num_row_tiles(num_rows, num_experts, block_m)
    rows, offset = take(workspace, 0, torch.int32, num_tiles, block_m)
    groups, offset = take(workspace, offset, torch.int32, num_tiles)
    gated, offset = take(workspace, offset, x.dtype, num_rows, intermediate)
    results, offset = take(workspace, offset, x.dtype, num_rows, hidden)
    group_rows(topk_ids.view(-1), num_experts, rows, groups, workspace[offset:])
    tile = tile or _tuned_tile(x, block_m, num_experts, intermediate)
    options = {
        "BLOCK_M": block_m, "BLOCK_N": tile.columns, "BLOCK_K": _BLOCK_K,
        "WIDE_DOT": interpreted() and x.dtype == torch.bfloat16, "PRECISION": dot_precision(x.dtype),
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
    _gate_up[(num_tiles * triton.cdiv(intermediate, options["BLOCK_N"]),)](
        x, w13, gated, rows, groups, num_rows, num_tiles, intermediate, hidden, top_k,
        x.stride(0), *w13.stride()[:2], gated.stride(0), TANH=activation == "gelu_tanh", **options,
    )  # fmt: skip
    _down[(num_tiles * triton.cdiv(hidden, options["BLOCK_N"]),)](
        gated, w2, topk_weights, results, rows, groups, num_rows, num_tiles, hidden, intermediate,
        gated.stride(0), *w2.stride()[:2], results.stride(0), **options,
    )  # fmt: skip
    block = min(1024, next_power_of_2(hidden))
    _combine[(num_tokens, triton.cdiv(hidden, block))](
        results, topk_ids, out, hidden, num_experts, results.stride(0), out.stride(0),
        TOP_K=top_k, BLOCK=block, num_warps=4,
    )  # fmt: skip


def choose_tile(num_rows: int, dtype: torch.dtype) -> Tile:
    """Return the tile of a mixture whose tiles have so many rows."""
    columns = 32 if dtype == torch.float32 else _COLUMNS
    return Tile(num_rows, columns, *((8, 3) if num_rows == 128 else (4, 4)))


def tuning_shape(num_experts: int, intermediate: int, hidden: int) -> str:
    """Return what distinguishes mixtures in the tuning cache."""
    return f"{num_experts} {intermediate}x{hidden}"


def _tuned_tile(x: Tensor, num_rows: int, num_experts: int, intermediate: int) -> Tile:
    shape = tuning_shape(num_experts, intermediate, x.shape[1])
    default = choose_tile(num_rows, x.dtype)
    return tuned("fused_moe", default, TUNABLE, rows=num_rows, shape=shape, dtype=x.dtype, device=x.device)


@triton.jit
def _gate_up(
    x_ptr, w_ptr, out_ptr, rows_ptr, groups_ptr, num_rows, num_tiles, intermediate, hidden, top_k,
    x_stride, w_stride_e, w_stride_o, out_stride, TANH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute a tile of activation(gate) * up."""
    tile, column_tile = tile_of(tl.program_id(0), num_tiles, tl.cdiv(intermediate, BLOCK_N), 8)
    expert = tl.load(groups_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    rows = tl.load(rows_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    live = rows < num_rows
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = columns < intermediate
    dtype: tl.constexpr = tl.float32 if WIDE_DOT else x_ptr.dtype.element_ty
    x_rows = x_ptr + (rows // top_k)[:, None] * x_stride
    gate_rows = w_ptr + expert * w_stride_e + columns.to(tl.int64)[None, :] * w_stride_o
    up_rows = w_ptr + expert * w_stride_e + (columns + intermediate).to(tl.int64)[None, :] * w_stride_o
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, hidden, BLOCK_K):
        inputs = first + tl.arange(0, BLOCK_K)
        inside = inputs < hidden
        x = tl.load(x_rows + inputs[None, :], mask=live[:, None] & inside[None, :], other=0.0).to(dtype)
        mask = inside[:, None] & in_columns[None, :]
        gate_weight = tl.load(gate_rows + inputs[:, None], mask=mask, other=0.0).to(dtype)
        up_weight = tl.load(up_rows + inputs[:, None], mask=mask, other=0.0).to(dtype)
        gate = tl.dot(x, gate_weight, acc=gate, input_precision=PRECISION)
        up = tl.dot(x, up_weight, acc=up, input_precision=PRECISION)
    # 0.5 * (1 + tanh(y)) = sigmoid(2y), and 1.5957... is 2 * sqrt(2 / pi)
    slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if TANH else gate
    result = gate / (1.0 + tl.exp(-slope)) * up
    out_rows = out_ptr + rows[:, None] * out_stride
    tl.store(out_rows + columns[None, :], result.to(out_ptr.dtype.element_ty), mask=live[:, None] & in_columns[None, :])


@triton.jit
def _down(
    x_ptr, w_ptr, factors_ptr, out_ptr, rows_ptr, groups_ptr, num_rows, num_tiles, hidden, intermediate,
    x_stride, w_stride_e, w_stride_o, out_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute a tile of the second product, times the rows' weights."""
    tile, column_tile = tile_of(tl.program_id(0), num_tiles, tl.cdiv(hidden, BLOCK_N), 8)
    expert = tl.load(groups_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    rows = tl.load(rows_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    live = rows < num_rows
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = columns < hidden
    dtype: tl.constexpr = tl.float32 if WIDE_DOT else x_ptr.dtype.element_ty
    x_rows = x_ptr + rows[:, None] * x_stride
    w_rows = w_ptr + expert * w_stride_e + columns.to(tl.int64)[None, :] * w_stride_o
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, intermediate, BLOCK_K):
        inputs = first + tl.arange(0, BLOCK_K)
        inside = inputs < intermediate
        x = tl.load(x_rows + inputs[None, :], mask=live[:, None] & inside[None, :], other=0.0).to(dtype)
        weight = tl.load(w_rows + inputs[:, None], mask=inside[:, None] & in_columns[None, :], other=0.0).to(dtype)
        sums = tl.dot(x, weight, acc=sums, input_precision=PRECISION)
    sums *= tl.load(factors_ptr + rows, mask=live, other=0.0)[:, None]
    out_rows = out_ptr + rows[:, None] * out_stride
    tl.store(out_rows + columns[None, :], sums.to(out_ptr.dtype.element_ty), mask=live[:, None] & in_columns[None, :])


@triton.jit
def _combine(
    results, ids, out, hidden, num_experts, results_stride, out_stride, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add what a token's experts returned, in the order of its ids."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(TOP_K):
        row = token * TOP_K + place
        expert = tl.load(ids + row)
        limit = tl.where((expert >= 0) & (expert < num_experts), hidden, 0)
        total += tl.load(results + row * results_stride + columns, mask=columns < limit, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + columns, total.to(out.dtype.element_ty), mask=columns < hidden)
