"""The activations of feed-forward layers, plain and gated."""

from torch import Tensor

from octavo_kernels import _check
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


def _check_approximate(op: str, approximate: str) -> None:
    _check.option(op, "approximate", approximate, approximate in ("none", "tanh"), "'none' or 'tanh'")


def _gated_output(op: str, x: Tensor, out: Tensor | None) -> Tensor:
    _check.same_device(op, x=x, out=out)
    _check.floating(op, x=x)
    if x.dim() == 0 or x.shape[-1] % 2:
        _check.shape(op, "x", x, ("...", "2 * intermediate", "(an even size)"))
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    if out is None:
        return empty_result(shape, x.dtype, x.device)
    _check.shape(op, "out", out, shape)
    _check.dtype(op, "out", out, x.dtype)
    return out
