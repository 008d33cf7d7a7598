"""The norms of the `cpu` backend: native code in fp32, torch elsewhere."""

import torch
from torch import Tensor

from octavo_kernels._dispatch import note_fallback
from octavo_kernels.cpu import abi
from octavo_kernels.cpu.fallback import norm as in_torch
from octavo_kernels.cpu.launch import launch, pointer
from octavo_kernels.cpu.load import library_for
from octavo_kernels.cpu.rows import row_stride

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor) -> None:
    """Fill out with the norm of x."""
    if not _launched("rms_norm", x, None, weight, eps, offset, out):
        in_torch.rms_norm(x, weight, eps, offset, out)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor) -> None:
    """Add x to the residual, then fill out with the norm of the stored sum."""
    if not _launched("add_rms_norm", x, residual, weight, eps, offset, out):
        in_torch.add_rms_norm(x, residual, weight, eps, offset, out)


def _launched(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, out: Tensor
) -> bool:
    """Run a norm natively if it can be; say whether it was."""
    if library_for(op) is None:
        return False
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        note_fallback(op, "x or weight is not float32; convert them with .float()")
        return False
    strides = row_stride(x), x.shape[-1] if residual is None else row_stride(residual), row_stride(out)
    if None in strides or weight.stride(0) != 1:
        note_fallback(op, "rows do not lie at one distance, or elements not side by side; pass tensor.contiguous()")
        return False
    size = x.shape[-1]
    args = abi.RmsNormArgs(
        pointer(x), pointer(residual), pointer(weight), pointer(out), *strides, size, eps, offset
    )  # fmt: skip
    launch(abi.OpKind.RMS_NORM, args, x.numel() // size, x, residual, weight, out)
    return True
