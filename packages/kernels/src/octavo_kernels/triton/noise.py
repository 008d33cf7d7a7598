"""Philox4x32-10 and the Gumbel noise made from it, in Triton: whole tiles of columns, and single values.

A tile is [ROWS, COLUMNS]: one row on a GPU, where a program each is fast; many in the interpreter, where one is slow.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.triton._launch import next_power_of_2, rows_of_a_program

_COLUMNS = 2048
_VALUES = 256


def philox(seeds: Tensor, sequence_index: Tensor, positions: Tensor, out: Tensor) -> None:
    """Fill out [rows, num_columns] int64 with random words."""
    _fill(seeds, sequence_index, positions, out, gumbel=False)


def gumbel_noise(seeds: Tensor, sequence_index: Tensor, positions: Tensor, out: Tensor) -> None:
    """Fill out [rows, num_columns] fp32 with noise."""
    _fill(seeds, sequence_index, positions, out, gumbel=True)


def gumbel_noise_at(seeds: Tensor, sequence_index: Tensor, positions: Tensor, columns: Tensor, out: Tensor) -> None:
    """Fill out [num_values] fp32 with the noise of single columns."""
    _noise_at[(triton.cdiv(len(out), _VALUES),)](
        seeds, sequence_index, positions, columns, out, len(out),
        seeds.stride(0), sequence_index.stride(0), positions.stride(0), columns.stride(0),
        BLOCK=_VALUES, num_warps=4,
    )  # fmt: skip


def _fill(seeds: Tensor, sequence_index: Tensor, positions: Tensor, out: Tensor, *, gumbel: bool) -> None:
    num_rows, num_columns = out.shape
    columns = min(_COLUMNS, max(4, next_power_of_2(num_columns)))
    rows = rows_of_a_program(num_rows, columns)
    _noise[(triton.cdiv(num_rows, rows), triton.cdiv(num_columns, columns))](
        seeds, sequence_index, positions, out, num_rows, num_columns,
        seeds.stride(0), sequence_index.stride(0), positions.stride(0),
        ROWS=rows, COLUMNS=columns, GUMBEL=gumbel, num_warps=4,
    )  # fmt: skip


@triton.jit
def random_words(seeds, sequence_index, positions, first_column, COLUMNS: tl.constexpr):
    """Return words [ROWS, COLUMNS] uint32 from a column on, a multiple of 4; keys are [ROWS] int64."""
    rows: tl.constexpr = seeds.shape[0]
    none = tl.zeros([rows, COLUMNS // 4], tl.int64)
    blocks = first_column // 4 + tl.arange(0, COLUMNS // 4)[None, :]
    w0, w1, w2, w3 = tl.philox(
        seeds[:, None],
        (sequence_index[:, None] + none).to(tl.uint32),
        (positions[:, None] + none).to(tl.uint32),
        ((positions[:, None] >> 32) + none).to(tl.uint32),
        (blocks + none).to(tl.uint32),
    )
    # [ROWS, COLUMNS / 4] each -> word c % 4 of block c // 4 in column c
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [rows, COLUMNS])


@triton.jit
def gumbel_of(words):
    """Return -log(-log((word + 0.5) / 2**32)); near 1 the inner logarithm comes from the distance to 1."""
    upper = words >= 0x80000000
    part = (tl.where(upper, ~words, words).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = 1.0 - part
    # What rounding took from `rest` is put back: log(1 - part) is then accurate to fp32 however small part is.
    from_rest = ((rest - 1.0) + part) / rest - tl.log(rest)
    return -tl.log(tl.where(upper, from_rest, -tl.log(part)))


@triton.jit
def gumbel_tile(seeds, sequence_index, positions, first_column, COLUMNS: tl.constexpr):
    """Return noise [ROWS, COLUMNS] fp32 from a column on, a multiple of 4."""
    return gumbel_of(random_words(seeds, sequence_index, positions, first_column, COLUMNS))


@triton.jit
def _noise(
    seeds_ptr, sequence_index_ptr, positions_ptr, out_ptr, num_rows, num_columns,
    seeds_stride, sequence_stride, positions_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GUMBEL: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = rows < num_rows
    first = tl.program_id(1) * COLUMNS
    words = random_words(
        tl.load(seeds_ptr + rows * seeds_stride, mask=live, other=0),
        tl.load(sequence_index_ptr + rows * sequence_stride, mask=live, other=0),
        tl.load(positions_ptr + rows * positions_stride, mask=live, other=0),
        first, COLUMNS,
    )  # fmt: skip
    columns = first + tl.arange(0, COLUMNS)[None, :]
    mask = live[:, None] & (columns < num_columns)
    values = gumbel_of(words) if GUMBEL else words.to(tl.int64)
    tl.store(out_ptr + rows[:, None] * num_columns + columns, values, mask=mask)


@triton.jit
def _noise_at(
    seeds_ptr, sequence_index_ptr, positions_ptr, columns_ptr, out_ptr, num_values,
    seeds_stride, sequence_stride, positions_stride, columns_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    values = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = values < num_values
    columns = tl.load(columns_ptr + values * columns_stride, mask=live, other=0)
    positions = tl.load(positions_ptr + values * positions_stride, mask=live, other=0)
    w0, w1, w2, w3 = tl.philox(
        tl.load(seeds_ptr + values * seeds_stride, mask=live, other=0),
        tl.load(sequence_index_ptr + values * sequence_stride, mask=live, other=0).to(tl.uint32),
        positions.to(tl.uint32),
        (positions >> 32).to(tl.uint32),
        (columns // 4).to(tl.uint32),
    )
    word = columns % 4
    low = tl.where(word == 0, w0, w1)
    high = tl.where(word == 2, w2, w3)
    tl.store(out_ptr + values, gumbel_of(tl.where(word < 2, low, high)), mask=live)
