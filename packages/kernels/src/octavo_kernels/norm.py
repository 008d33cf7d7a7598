"""Root-mean-square norms, alone and fused with the residual addition."""

import torch
from torch import Tensor

from octavo_kernels import _check
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
    _check.shape(op, "residual", residual, x.shape)
    _check.dtype(op, "residual", residual, x.dtype)
    _check.same_device(op, x=x, residual=residual)
    out = empty_result(x.shape, x.dtype, x.device) if out is None else out
    if x.numel():
        implementation(op, device)(x, residual, weight, eps, offset, out)
    return out


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
