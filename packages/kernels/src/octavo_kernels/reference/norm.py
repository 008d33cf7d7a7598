"""Root-mean-square norms."""

import torch
from torch import Tensor

from octavo_kernels._codes import CodeOutput
from octavo_kernels.reference._codes import write_codes
from octavo_kernels.reference._precision import widen


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor) -> None:
    """Fill out with the norm of x."""
    out.copy_(normalised(x, weight, eps, offset))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor) -> None:
    """Add x to the residual, then fill out with the norm of the stored sum."""
    residual.copy_(widen(residual) + widen(x))
    out.copy_(normalised(residual, weight, eps, offset))


def rms_norm_quant(x: Tensor, weight: Tensor, eps: float, offset: float, output: CodeOutput) -> None:
    """Fill the output with the norm of x."""
    write_codes(normalised(x, weight, eps, offset), output)


def add_rms_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, output: CodeOutput
) -> None:
    """Add x to the residual, then fill the output with the norm of the stored sum."""
    residual.copy_(widen(residual) + widen(x))
    write_codes(normalised(residual, weight, eps, offset), output)


def normalised(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Return the norm of x over its last dimension, unrounded."""
    wide = widen(x)
    mean_square = (wide * wide).mean(dim=-1, keepdim=True)
    return wide / torch.sqrt(mean_square + eps) * (offset + weight.to(wide.dtype))
