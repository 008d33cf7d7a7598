"""The activations of feed-forward layers, plain and gated, with results in full or in 8 bits."""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._codes import code_output
from octavo_kernels._dispatch import implementation
from octavo_kernels.recording import empty_result


def silu_and_mul(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up, where gate is the first half of x's last dimension (SwiGLU, arXiv 2002.05202).

    Args:
        x: [..., 2 * intermediate], a floating dtype; computed in fp32 (fp64 for fp64) and rounded once.
        out: [..., intermediate], x's dtype; allocated when None.

    Returns:
        out.

    Raises:
        ShapeError, DtypeError, DeviceError: an argument does not fit.

    """
    op = "silu_and_mul"
    out = _gated_output(op, x, out)
    if out.numel():
        implementation(op, x.device)(x, out)
    return out


def gelu_and_mul(x: Tensor, *, approximate: str = "none", out: Tensor | None = None) -> Tensor:
    """Return gelu(gate) * up, where gate is the first half of x's last dimension (GEGLU, arXiv 2002.05202).

    Args:
        x: [..., 2 * intermediate], a floating dtype; computed in fp32 (fp64 for fp64) and rounded once.
        approximate: "none" for the error function, "tanh" for its approximation (arXiv 1606.08415).
        out: [..., intermediate], x's dtype; allocated when None.

    Returns:
        out.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "gelu_and_mul"
    _check_approximate(op, approximate)
    out = _gated_output(op, x, out)
    if out.numel():
        implementation(op, x.device)(x, approximate, out)
    return out


def gelu(x: Tensor, approximate: str = "none", out: Tensor | None = None) -> Tensor:
    """Return x * Phi(x), Phi the normal distribution function (arXiv 1606.08415).

    Args:
        x: any shape, a floating dtype.
        approximate: "none" for the error function, "tanh" for its approximation.
        out: like x; allocated when None.

    Returns:
        out.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "gelu"
    _check_approximate(op, approximate)
    device = _check.same_device(op, x=x, out=out)
    _check.floating(op, x=x)
    if out is None:
        out = empty_result(x.shape, x.dtype, x.device)
    _check.shape(op, "out", out, x.shape)
    _check.dtype(op, "out", out, x.dtype)
    if x.numel():
        implementation(op, device)(x, approximate, out)
    return out


def silu_and_mul_quant(
    x: Tensor,
    dtype: torch.dtype,
    *,
    group_size: int | None = None,
    fixed_scale: Tensor | None = None,
    out: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return silu(gate) * up in 8 bits, and its scales; x is that of `silu_and_mul`, the rest of `rms_norm_quant`."""
    op = "silu_and_mul_quant"
    shape = _gated_shape(op, x)
    result = code_output(
        op, shape, x.device, dtype=dtype, group_size=group_size, fixed_scale=fixed_scale, out=out, scales=scales
    )
    if result.codes.numel():
        implementation(op, x.device)(x, result)
    return result.codes, result.scales


def gelu_and_mul_quant(
    x: Tensor,
    dtype: torch.dtype,
    *,
    approximate: str = "none",
    group_size: int | None = None,
    fixed_scale: Tensor | None = None,
    out: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return gelu(gate) * up in 8 bits, and its scales.

    x and approximate are those of `gelu_and_mul`, the rest is that of `rms_norm_quant`.
    """
    op = "gelu_and_mul_quant"
    _check_approximate(op, approximate)
    shape = _gated_shape(op, x)
    result = code_output(
        op, shape, x.device, dtype=dtype, group_size=group_size, fixed_scale=fixed_scale, out=out, scales=scales
    )
    if result.codes.numel():
        implementation(op, x.device)(x, approximate, result)
    return result.codes, result.scales


def gelu_quant(
    x: Tensor,
    dtype: torch.dtype,
    *,
    approximate: str = "none",
    group_size: int | None = None,
    fixed_scale: Tensor | None = None,
    out: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return gelu(x) in 8 bits, and its scales; x has at least one dimension, the rest is that of `rms_norm_quant`."""
    op = "gelu_quant"
    _check_approximate(op, approximate)
    _check.floating(op, x=x)
    if x.dim() == 0:
        _check.rank(op, "x", x, ("...", "size"))
    result = code_output(
        op, x.shape, x.device, dtype=dtype, group_size=group_size, fixed_scale=fixed_scale, out=out, scales=scales
    )
    if x.numel():
        implementation(op, x.device)(x, approximate, result)
    return result.codes, result.scales


def _check_approximate(op: str, approximate: str) -> None:
    _check.option(op, "approximate", approximate, approximate in ("none", "tanh"), "'none' or 'tanh'")


def _gated_shape(op: str, x: Tensor) -> tuple[int, ...]:
    """Return the shape of a gated result."""
    _check.floating(op, x=x)
    if x.dim() == 0 or x.shape[-1] % 2:
        _check.shape(op, "x", x, ("...", "2 * intermediate", "(an even size)"))
    return (*x.shape[:-1], x.shape[-1] // 2)


def _gated_output(op: str, x: Tensor, out: Tensor | None) -> Tensor:
    _check.same_device(op, x=x, out=out)
    shape = _gated_shape(op, x)
    if out is None:
        return empty_result(shape, x.dtype, x.device)
    _check.shape(op, "out", out, shape)
    _check.dtype(op, "out", out, x.dtype)
    return out
