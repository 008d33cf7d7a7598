"""The activations of feed-forward layers in Triton: a program owns columns of one row (of many in the interpreter).

Where a row has one scale, which needs all of it, a program owns the row and computes it twice.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import math

import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels._codes import CodeOutput
from octavo_kernels.triton._codes import codes_of, inverse_of, larger, largest_magnitude, store_codes, stored
from octavo_kernels.triton._launch import as_rows, check_dtypes, next_power_of_2, rows_of_a_program

_RUN = 1024  # columns of a program
_STEP = 4096  # columns that a program which owns a row takes at once
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_TANH_FACTOR = tl.constexpr(-2.0 * math.sqrt(2.0 / math.pi))


def silu_and_mul(x: Tensor, out: Tensor) -> None:
    """Fill out with silu(gate) * up."""
    _launch("silu_and_mul", x, "silu", out, None)


def gelu_and_mul(x: Tensor, approximate: str, out: Tensor) -> None:
    """Fill out with gelu(gate) * up."""
    _launch("gelu_and_mul", x, _gelu_kind(approximate), out, None)


def gelu(x: Tensor, approximate: str, out: Tensor) -> None:
    """Fill out with the gelu of x."""
    _launch("gelu", x, _gelu_kind(approximate), out, None, gated=False)


def silu_and_mul_quant(x: Tensor, output: CodeOutput) -> None:
    """Fill the output with silu(gate) * up."""
    _launch("silu_and_mul_quant", x, "silu", output.codes, output)


def gelu_and_mul_quant(x: Tensor, approximate: str, output: CodeOutput) -> None:
    """Fill the output with gelu(gate) * up."""
    _launch("gelu_and_mul_quant", x, _gelu_kind(approximate), output.codes, output)


def gelu_quant(x: Tensor, approximate: str, output: CodeOutput) -> None:
    """Fill the output with the gelu of x."""
    _launch("gelu_quant", x, _gelu_kind(approximate), output.codes, output, gated=False)


def _gelu_kind(approximate: str) -> str:
    return "gelu" if approximate == "none" else "gelu_tanh"


def _launch(op: str, x: Tensor, kind: str, out: Tensor, output: CodeOutput | None, *, gated: bool = True) -> None:
    check_dtypes(op, x=x)
    x_rows, out_rows = as_rows(op, "x", x), as_rows(op, "out", out)
    num_outer, num_inner, size = out_rows.shape
    num_rows = num_outer * num_inner
    places = num_rows, num_inner, *x_rows.stride()[:2], *out_rows.stride()[:2]
    flags = {"SIZE": size, "KIND": kind, "GATED": gated}
    if output is not None and not output.is_fixed and output.group_size == size:
        block = min(_STEP, next_power_of_2(size))
        rows = rows_of_a_program(num_rows, block)
        _activate_row[(triton.cdiv(num_rows, rows),)](
            x_rows, out_rows, output.scales, *places,
            **flags, ROWS=rows, BLOCK=block, LARGEST=output.largest, num_warps=min(8, max(1, block // 256)),
        )  # fmt: skip
        return
    block = min(_RUN, next_power_of_2(size))
    rows = rows_of_a_program(num_rows, block)
    _activate[(triton.cdiv(num_rows, rows), triton.cdiv(size, block))](
        x_rows, out_rows, None if output is None else output.scales, *places,
        0 if output is None else output.scales.shape[-1],
        **flags, ROWS=rows, BLOCK=block,
        GROUPS=1 if output is None else -(-block // next_power_of_2(output.group_size)),
        LARGEST=0.0 if output is None else output.largest, FIXED=output is not None and output.is_fixed,
        num_warps=min(4, max(1, block // 256)),
    )  # fmt: skip


@triton.jit
def _activated(x_rows, columns, mask, SIZE: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr):
    """Return elements [ROWS, BLOCK] of a result in fp32; 0 outside the mask."""
    gate = tl.load(x_rows + columns, mask=mask, other=0.0).to(tl.float32)
    if KIND == "silu":
        activated = gate / (1.0 + tl.exp(-gate))
    elif KIND == "gelu":
        activated = 0.5 * gate * (1.0 + tl.math.erf(gate * _SQRT_HALF))
    else:
        # (1 + tanh(y)) / 2 = 1 / (1 + exp(-2y)), which overflows to the right limits.
        activated = gate / (1.0 + tl.exp((gate + 0.044715 * gate * gate * gate) * _TANH_FACTOR))
    if GATED:
        activated *= tl.load(x_rows + SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    return activated


@triton.jit
def _activate(
    x_ptr, out_ptr, scales_ptr, num_rows, num_inner, x_stride_o, x_stride_i, out_stride_o, out_stride_i, num_scales,
    SIZE: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    GROUPS: tl.constexpr, LARGEST: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    run = tl.program_id(1)
    columns = run * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (columns < SIZE)
    x_rows = x_ptr + rows // num_inner * x_stride_o + rows % num_inner * x_stride_i
    out = out_ptr + rows // num_inner * out_stride_o + rows % num_inner * out_stride_i + columns
    activated = _activated(x_rows, columns, mask, SIZE, KIND, GATED)
    if scales_ptr is None:
        tl.store(out, stored(activated, out_ptr.dtype.element_ty), mask=mask)
    else:
        store_codes(
            activated, out, mask, scales_ptr, rows, num_rows, run * GROUPS, num_scales, GROUPS, LARGEST, FIXED
        )  # fmt: skip


@triton.jit
def _activate_row(
    x_ptr, out_ptr, scales_ptr, num_rows, num_inner, x_stride_o, x_stride_i, out_stride_o, out_stride_i,
    SIZE: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = rows < num_rows
    x_rows = (x_ptr + rows // num_inner * x_stride_o + rows % num_inner * x_stride_i)[:, None]
    out_rows = (out_ptr + rows // num_inner * out_stride_o + rows % num_inner * out_stride_i)[:, None]
    largest = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, SIZE, BLOCK):
        columns = first + tl.arange(0, BLOCK)[None, :]
        mask = live[:, None] & (columns < SIZE)
        largest = larger(largest, tl.abs(_activated(x_rows, columns, mask, SIZE, KIND, GATED)))
    scale = tl.div_rn(largest_magnitude(largest), LARGEST)
    tl.store(scales_ptr + rows, scale, mask=live)
    inverse = inverse_of(scale)[:, None]
    for first in range(0, SIZE, BLOCK):
        columns = first + tl.arange(0, BLOCK)[None, :]
        mask = live[:, None] & (columns < SIZE)
        activated = _activated(x_rows, columns, mask, SIZE, KIND, GATED)
        tl.store(out_rows + columns, codes_of(activated, inverse, out_ptr.dtype.element_ty, LARGEST), mask=mask)
