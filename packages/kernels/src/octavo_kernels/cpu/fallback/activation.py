"""Activations of feed-forward layers by torch's vectorised functions."""

import torch
import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(x: Tensor, out: Tensor) -> None:
    """Fill out with silu(gate) * up."""
    gate, up = _wide(x).chunk(2, dim=-1)
    torch.mul(F.silu(gate), up, out=out)


def gelu_and_mul(x: Tensor, approximate: str, out: Tensor) -> None:
    """Fill out with gelu(gate) * up."""
    gate, up = _wide(x).chunk(2, dim=-1)
    torch.mul(F.gelu(gate, approximate=approximate), up, out=out)


def gelu(x: Tensor, approximate: str, out: Tensor) -> None:
    """Fill out with the gelu of x."""
    out.copy_(F.gelu(_wide(x), approximate=approximate))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)
