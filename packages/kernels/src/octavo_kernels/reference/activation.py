"""Activations of feed-forward layers, written out."""

import math

import torch
from torch import Tensor

from octavo_kernels._codes import CodeOutput
from octavo_kernels.reference._codes import write_codes
from octavo_kernels.reference._precision import widen


def silu_and_mul(x: Tensor, out: Tensor) -> None:
    """Fill out with gate / (1 + exp(-gate)) * up."""
    out.copy_(_silu_and_mul(x))


def gelu_and_mul(x: Tensor, approximate: str, out: Tensor) -> None:
    """Fill out with gelu(gate) * up."""
    out.copy_(_gelu_and_mul(x, approximate))


def gelu(x: Tensor, approximate: str, out: Tensor) -> None:
    """Fill out with the gelu of x."""
    out.copy_(_gelu(widen(x), approximate))


def silu_and_mul_quant(x: Tensor, output: CodeOutput) -> None:
    """Fill the output with silu(gate) * up."""
    write_codes(_silu_and_mul(x), output)


def gelu_and_mul_quant(x: Tensor, approximate: str, output: CodeOutput) -> None:
    """Fill the output with gelu(gate) * up."""
    write_codes(_gelu_and_mul(x, approximate), output)


def gelu_quant(x: Tensor, approximate: str, output: CodeOutput) -> None:
    """Fill the output with the gelu of x."""
    write_codes(_gelu(widen(x), approximate), output)


def _silu_and_mul(x: Tensor) -> Tensor:
    gate, up = widen(x).chunk(2, dim=-1)
    return gate / (1.0 + torch.exp(-gate)) * up


def _gelu_and_mul(x: Tensor, approximate: str) -> Tensor:
    gate, up = widen(x).chunk(2, dim=-1)
    return _gelu(gate, approximate) * up


def _gelu(x: Tensor, approximate: str) -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))
