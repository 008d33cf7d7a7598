"""Rows of activations rounded to 8 bits as they come, with a scale per row or per group of 128."""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._codes import code_output
from octavo_kernels._dispatch import implementation


def quantize_rows(
    x: Tensor,
    dtype: torch.dtype,
    *,
    group_size: int | None = None,
    out: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return rows in 8 bits and their scales: scale = max|x| / largest code, in fp32, and code = x * (1 / scale).

    Whole numbers are rounded half to even. Codes are 0 where the scale or its reciprocal is not finite.

    Args:
        x: [num_tokens, in_features] fp32, fp16 or bf16; the stride of rows is free.
        dtype: int8 (codes from -127 to 127) or float8_e4m3fn (to 448).
        group_size: 128 for a scale per group of 128 inputs, the last one perhaps smaller; None for one per row.
        out: [num_tokens, in_features] of dtype, the stride of rows is free; allocated when None.
        scales: [num_tokens, num_groups] fp32, contiguous; allocated when None.

    Returns:
        out: the codes.
        scales: the factors by which they are multiplied.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "quantize_rows"
    device = _check.same_device(op, x=x, out=out, scales=scales)
    _check.rank(op, "x", x, ("num_tokens", "in_features"))
    _check.floating(op, x=x)
    _check.last_dim_contiguous(op, x=x)
    output = code_output(
        op, x.shape, device, dtype=dtype, group_size=group_size, fixed_scale=None, out=out, scales=scales
    )
    _check.last_dim_contiguous(op, out=output.codes)
    if x.numel():
        implementation(op, device)(x, output)
    return output.codes, output.scales
