"""The activations of the `cpu` backend: gated ones native in fp32, torch elsewhere."""

import torch
from torch import Tensor

from octavo_kernels._dispatch import note_fallback
from octavo_kernels.cpu import abi
from octavo_kernels.cpu.fallback import activation as in_torch
from octavo_kernels.cpu.launch import launch, pointer
from octavo_kernels.cpu.load import library_for
from octavo_kernels.cpu.rows import row_stride

__all__ = ["gelu", "gelu_and_mul", "silu_and_mul"]

_SILU, _GELU_ERF, _GELU_TANH = 0, 1, 2


def silu_and_mul(x: Tensor, out: Tensor) -> None:
    """Fill out with silu(gate) * up."""
    if not _launched("silu_and_mul", x, out, _SILU):
        in_torch.silu_and_mul(x, out)


def gelu_and_mul(x: Tensor, approximate: str, out: Tensor) -> None:
    """Fill out with gelu(gate) * up."""
    if not _launched("gelu_and_mul", x, out, _GELU_TANH if approximate == "tanh" else _GELU_ERF):
        in_torch.gelu_and_mul(x, approximate, out)


def gelu(x: Tensor, approximate: str, out: Tensor) -> None:
    """Fill out with the gelu of x; torch serves it, the native library has no activation without a gate."""
    in_torch.gelu(x, approximate, out)


def _launched(op: str, x: Tensor, out: Tensor, activation: int) -> bool:
    """Run an activation natively if it can be; say whether it was."""
    if library_for(op) is None:
        return False
    if x.dtype != torch.float32:
        dtype = str(x.dtype).removeprefix("torch.")
        note_fallback(op, f"x has dtype {dtype}, expected float32; convert it with x.float()")
        return False
    x_stride, out_stride = row_stride(x), row_stride(out)
    if x_stride is None or out_stride is None:
        note_fallback(op, "rows do not lie at one distance, or elements not side by side; pass tensor.contiguous()")
        return False
    size = out.shape[-1]
    args = abi.GatedArgs(pointer(x), pointer(out), x_stride, out_stride, size, activation)
    launch(abi.OpKind.GATED, args, out.numel() // size, x, out)
    return True
