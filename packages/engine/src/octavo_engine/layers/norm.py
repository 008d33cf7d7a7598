"""RMSNorm: the norm before each block, fused with the addition of the residual."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from octavo_engine.layers.options import LayerOptions
from octavo_engine.quant.base import WeightSlot
from octavo_kernels import add_rms_norm, rms_norm


class RMSNorm:
    """Root-mean-square norm over the last dimension (arXiv 1910.07467)."""

    __slots__ = ("eps", "weight")

    def __init__(self, hidden_size: int, eps: float, *, options: LayerOptions) -> None:
        self.weight = options.vector(hidden_size)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of x [num_tokens, hidden_size]."""
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add x to the residual in place and return the norm of the sum, in the memory of x."""
        return add_rms_norm(x, residual, self.weight, self.eps, out=x)

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield where the checkpoint's tensor goes."""
        yield WeightSlot.into(f"{prefix}.weight", self.weight)
