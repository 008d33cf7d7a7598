"""Root-mean-square norms, alone and fused with the residual addition, with results in full or in 8 bits."""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._codes import code_output
from octavo_kernels._dispatch import implementation
from octavo_kernels.recording import empty_result


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, out: Tensor | None = None) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) * (offset + weight) over the last dimension (RMSNorm, arXiv 1910.07467).

    The sums are fp32 (fp64 for fp64 tensors); the result is rounded once.

    Args:
        x: [..., hidden], a floating dtype.
        weight: [hidden], a floating dtype.
        eps: added to the mean square.
        offset: added to the weight; 1 for Gemma's weights.
        out: like x, or x itself; allocated when None.

    Returns:
        out.

    Raises:
        ShapeError, DtypeError, DeviceError: an argument does not fit.

    """
    device = _check_norm("rms_norm", x, weight, out)
    out = empty_result(x.shape, x.dtype, x.device) if out is None else out
    if x.numel():
        implementation("rms_norm", device)(x, weight, eps, offset, out)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, out: Tensor | None = None
) -> Tensor:
    """Add x to the residual in place, and return the RMS norm of the sum.

    The norm reads the residual as it is stored, that is after rounding to its dtype.

    Args:
        x: [..., hidden], a floating dtype.
        residual: like x; modified.
        weight: [hidden], a floating dtype.
        eps: added to the mean square.
        offset: added to the weight.
        out: like x, or x itself; allocated when None.

    Returns:
        out.

    Raises:
        ShapeError, DtypeError, DeviceError: an argument does not fit.

    """
    op = "add_rms_norm"
    device = _check_norm(op, x, weight, out)
    _check_residual(op, x, residual)
    out = empty_result(x.shape, x.dtype, x.device) if out is None else out
    if x.numel():
        implementation(op, device)(x, residual, weight, eps, offset, out)
    return out


def rms_norm_quant(
    x: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    offset: float = 0.0,
    group_size: int | None = None,
    fixed_scale: Tensor | None = None,
    out: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the RMS norm of x in 8 bits, and its scales; the norm itself is not rounded in between.

    The scale of some elements is the largest of them by magnitude over the largest code, in fp32, and a code is its
    element times 1 / scale; whole numbers are rounded half to even. Codes are 0 where the scale or its reciprocal is
    not finite, as where an element is NaN.

    Args:
        x: [..., hidden], a floating dtype.
        weight: [hidden], a floating dtype.
        eps: added to the mean square.
        dtype: int8 (codes from -127 to 127) or float8_e4m3fn (to 448).
        offset: added to the weight; 1 for Gemma's weights.
        group_size: 128 for a scale per group of 128 elements, the last one perhaps smaller; None for one per row.
        fixed_scale: [1, 1] fp32, a scale for all, known beforehand: what it cannot hold gets the largest code. None
            takes the scales from x.
        out: [..., hidden] of dtype; allocated when None.
        scales: [..., num_groups] fp32, contiguous; allocated when None.

    Returns:
        out: the codes.
        scales: the factors by which they are multiplied; fixed_scale where it was given.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "rms_norm_quant"
    device = _check_norm(op, x, weight, None)
    result = code_output(
        op, x.shape, device, dtype=dtype, group_size=group_size, fixed_scale=fixed_scale, out=out, scales=scales
    )
    if x.numel():
        implementation(op, device)(x, weight, eps, offset, result)
    return result.codes, result.scales


def add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    offset: float = 0.0,
    group_size: int | None = None,
    fixed_scale: Tensor | None = None,
    out: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add x to the residual in place, and return the RMS norm of the sum in 8 bits, and its scales.

    Arguments, results and errors are those of `add_rms_norm` and `rms_norm_quant`.
    """
    op = "add_rms_norm_quant"
    device = _check_norm(op, x, weight, None)
    _check_residual(op, x, residual)
    result = code_output(
        op, x.shape, device, dtype=dtype, group_size=group_size, fixed_scale=fixed_scale, out=out, scales=scales
    )
    if x.numel():
        implementation(op, device)(x, residual, weight, eps, offset, result)
    return result.codes, result.scales


def _check_residual(op: str, x: Tensor, residual: Tensor) -> None:
    _check.shape(op, "residual", residual, x.shape)
    _check.dtype(op, "residual", residual, x.dtype)
    _check.same_device(op, x=x, residual=residual)


def _check_norm(op: str, x: Tensor, weight: Tensor, out: Tensor | None) -> torch.device:
    device = _check.same_device(op, x=x, weight=weight, out=out)
    if x.dim() == 0:
        _check.rank(op, "x", x, ("...", "hidden"))
    _check.floating(op, x=x, weight=weight)
    _check.shape(op, "weight", weight, (x.shape[-1],))
    if out is not None:
        _check.shape(op, "out", out, x.shape)
        _check.dtype(op, "out", out, x.dtype)
    return device
