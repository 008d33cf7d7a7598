"""Rows rounded to 8 bits in Triton: one program per row and group, or per row, which it then reads twice."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels._codes import CodeOutput
from octavo_kernels.triton._codes import codes_of, inverse_of, larger, largest_magnitude
from octavo_kernels.triton._launch import check_dtypes, next_power_of_2

_LONGEST = 4096  # inputs of a row that one step takes


def quantize_rows(x: Tensor, output: CodeOutput) -> None:
    """Fill the output as `octavo_kernels.quantize_rows` says."""
    check_dtypes("quantize_rows", x=x)
    num_tokens, in_features = x.shape
    block = min(_LONGEST, next_power_of_2(output.group_size))
    _quantize[(num_tokens, output.scales.shape[1])](
        x, output.codes, output.scales, in_features, output.group_size, x.stride(0), output.codes.stride(0),
        output.scales.shape[1], LARGEST=output.largest, BLOCK=block, num_warps=1 if block <= 128 else 4,
    )  # fmt: skip


@triton.jit
def _quantize(
    x_ptr, out_ptr, scales_ptr, in_features, size, x_stride, out_stride, num_groups,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    end = tl.minimum((group + 1) * size, in_features)
    x_row = x_ptr + token * x_stride
    places = tl.arange(0, BLOCK)[None, :]
    largest = tl.zeros([1], tl.float32)
    for first in range(group * size, end, BLOCK):
        x = tl.load(x_row + first + places, mask=first + places < end, other=0.0)
        largest = larger(largest, largest_magnitude(x.to(tl.float32)))
    scale = tl.div_rn(largest, LARGEST)
    inverse = inverse_of(scale)[:, None]
    for first in range(group * size, end, BLOCK):
        inside = first + places < end
        x = tl.load(x_row + first + places, mask=inside, other=0.0).to(tl.float32)
        codes = codes_of(x, inverse, out_ptr.dtype.element_ty, LARGEST)
        tl.store(out_ptr + token * out_stride + first + places, codes, mask=inside)
    tl.store(scales_ptr + token * num_groups + group + tl.arange(0, 1), scale)
