"""Rows rounded to 8 bits in Triton: one program per row and group, or per row, which it then reads twice."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.triton._launch import check_dtypes, next_power_of_2

_LONGEST = 4096  # inputs of a row that one step takes
_TO_WHOLE = tl.constexpr(1.5 * 2**23)  # adding it to a small number in fp32 rounds that to whole ones, half to even
_TO_FP8_STEP = tl.constexpr(1.5 * 2**14)  # likewise to multiples of 2**-9, the step of e4m3 below 2**-6
_LEAST_NORMAL = tl.constexpr(2.0**-6)


def quantize_rows(x: Tensor, group_size: int | None, out: Tensor, scales: Tensor) -> None:
    """Fill out and scales as `octavo_kernels.quantize_rows` says."""
    check_dtypes("quantize_rows", x=x)
    num_tokens, in_features = x.shape
    size = in_features if group_size is None else group_size
    is_int = out.dtype == torch.int8
    block = min(_LONGEST, next_power_of_2(size))
    _quantize[(num_tokens, scales.shape[1])](
        x, out, scales, in_features, size, x.stride(0), out.stride(0), scales.shape[1],
        LIMIT=127.0 if is_int else 448.0, WHOLE=is_int, BLOCK=block, num_warps=1 if block <= 128 else 4,
    )  # fmt: skip


@triton.jit
def _quantize(
    x_ptr, out_ptr, scales_ptr, in_features, size, x_stride, out_stride, num_groups,
    LIMIT: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    begin = group * size
    end = tl.minimum(begin + size, in_features)
    x_row = x_ptr + token * x_stride
    largest = 0.0
    for first in range(begin, end, BLOCK):
        inputs = first + tl.arange(0, BLOCK)
        values = tl.abs(tl.load(x_row + inputs, mask=inputs < end, other=0.0).to(tl.float32))
        # The largest number that is not NaN would hide that one is.
        poisoned = tl.max((values != values).to(tl.int32), 0) > 0
        largest = tl.maximum(largest, tl.where(poisoned, float("inf"), tl.max(values, 0)))
    scale = tl.div_rn(largest, LIMIT)
    inverse = tl.div_rn(1.0, tl.where(scale == 0.0, 1.0, scale))
    usable = (scale > 0.0) & (scale < float("inf")) & (inverse < float("inf"))
    factor = tl.where(usable, inverse, 0.0)
    for first in range(begin, end, BLOCK):
        inputs = first + tl.arange(0, BLOCK)
        values = tl.load(x_row + inputs, mask=inputs < end, other=0.0).to(tl.float32)
        codes = tl.where(usable, values, 0.0) * factor
        codes = tl.minimum(tl.maximum(codes, -LIMIT), LIMIT)
        codes = (codes + _TO_WHOLE) - _TO_WHOLE if WHOLE else _as_fp8(codes)
        tl.store(out_ptr + token * out_stride + inputs, codes.to(out_ptr.dtype.element_ty), mask=inputs < end)
    tl.store(scales_ptr + token * num_groups + group, scale)


@triton.jit
def _as_fp8(values):
    """Round fp32 to what float8_e4m3fn holds, half to even; the interpreter's own conversion loses a carry."""
    bits = values.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(values) < _LEAST_NORMAL, (values + _TO_FP8_STEP) - _TO_FP8_STEP, normal)
