"""The activations of feed-forward layers in Triton: a program owns a run of columns of one row.

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
from octavo_kernels.triton._launch import as_rows, check_dtypes, next_power_of_2

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
    places = num_inner, *x_rows.stride()[:2], *out_rows.stride()[:2]
    flags = {"SIZE": size, "KIND": kind, "GATED": gated}
    if output is not None and not output.is_fixed and output.group_size == size:
        block = min(_STEP, next_power_of_2(size))
        _activate_row[(num_outer * num_inner,)](
            x_rows, out_rows, output.scales, *places,
            **flags, BLOCK=block, LARGEST=output.largest, num_warps=min(8, max(1, block // 256)),
        )  # fmt: skip
        return
    block = min(_RUN, next_power_of_2(size))
    _activate[(num_outer * num_inner, triton.cdiv(size, block))](
        x_rows, out_rows, None if output is None else output.scales, *places,
        0 if output is None else output.scales.shape[-1],
        **flags, BLOCK=block, GROUPS=1 if output is None else -(-block // next_power_of_2(output.group_size)),
        LARGEST=0.0 if output is None else output.largest, FIXED=output is not None and output.is_fixed,
        num_warps=min(4, max(1, block // 256)),
    )  # fmt: skip


@triton.jit
def _activated(x_row, columns, mask, SIZE: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr):
    """Return some elements of a result in fp32; 0 outside the mask."""
    gate = tl.load(x_row + columns, mask=mask, other=0.0).to(tl.float32)
    if KIND == "silu":
        activated = gate / (1.0 + tl.exp(-gate))
    elif KIND == "gelu":
        activated = 0.5 * gate * (1.0 + tl.math.erf(gate * _SQRT_HALF))
    else:
        # (1 + tanh(y)) / 2 = 1 / (1 + exp(-2y)), which overflows to the right limits.
        activated = gate / (1.0 + tl.exp((gate + 0.044715 * gate * gate * gate) * _TANH_FACTOR))
    if GATED:
        activated *= tl.load(x_row + SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    return activated


@triton.jit
def _activate(
    x_ptr, out_ptr, scales_ptr, num_inner, x_stride_o, x_stride_i, out_stride_o, out_stride_i, num_scales,
    SIZE: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    LARGEST: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    run = tl.program_id(1)
    x_row = x_ptr + row // num_inner * x_stride_o + row % num_inner * x_stride_i
    out_row = out_ptr + row // num_inner * out_stride_o + row % num_inner * out_stride_i
    columns = run * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    activated = _activated(x_row, columns, mask, SIZE, KIND, GATED)
    if scales_ptr is None:
        tl.store(out_row + columns, stored(activated, out_ptr.dtype.element_ty), mask=mask)
    else:
        first_group = run * GROUPS
        store_codes(
            activated, out_row, columns, mask, scales_ptr, row * num_scales + first_group, num_scales - first_group,
            GROUPS, LARGEST, FIXED,
        )  # fmt: skip


@triton.jit
def _activate_row(
    x_ptr, out_ptr, scales_ptr, num_inner, x_stride_o, x_stride_i, out_stride_o, out_stride_i,
    SIZE: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row // num_inner * x_stride_o + row % num_inner * x_stride_i
    out_row = out_ptr + row // num_inner * out_stride_o + row % num_inner * out_stride_i
    largest = tl.zeros([1, BLOCK], tl.float32)
    for first in range(0, SIZE, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        activated = _activated(x_row, columns, columns < SIZE, SIZE, KIND, GATED)
        largest = larger(largest, tl.abs(activated)[None, :])
    scale = tl.div_rn(largest_magnitude(largest), LARGEST)
    tl.store(scales_ptr + row + tl.arange(0, 1), scale)
    inverse = inverse_of(scale)
    for first in range(0, SIZE, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < SIZE
        codes = codes_of(
            _activated(x_row, columns, mask, SIZE, KIND, GATED), inverse, out_ptr.dtype.element_ty, LARGEST
        )  # fmt: skip
        tl.store(out_row + columns, codes, mask=mask)
