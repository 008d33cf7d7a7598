"""Activations of feed-forward layers, written out."""

import math

import torch
from torch import Tensor

from octavo_kernels.reference._precision import widen


def silu_and_mul(x: Tensor, out: Tensor) -> None:
    """Fill out with gate / (1 + exp(-gate)) * up."""
    gate, up = widen(x).chunk(2, dim=-1)
    out.copy_(gate / (1.0 + torch.exp(-gate)) * up)


def gelu_and_mul(x: Tensor, approximate: str, out: Tensor) -> None:
    """Fill out with gelu(gate) * up."""
    gate, up = widen(x).chunk(2, dim=-1)
    out.copy_(_gelu(gate, approximate) * up)


def gelu(x: Tensor, approximate: str, out: Tensor) -> None:
    """Fill out with the gelu of x."""
    out.copy_(_gelu(widen(x), approximate))


def _gelu(x: Tensor, approximate: str) -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))
