"""Root-mean-square norms in few passes."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor) -> None:
    """Fill out with the norm of x."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    factor = weight.to(wide)
    if offset:
        factor = factor + offset
    normed = F.rms_norm(x.to(wide), (x.shape[-1],), factor, eps)
    out.copy_(normed)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor) -> None:
    """Add x to the residual, then fill out with the norm of the stored sum."""
    residual.add_(x)
    rms_norm(residual, weight, eps, offset, out)
