"""Products of 8-bit codes: the values written out, sums in fp64."""

from torch import Tensor

from octavo_kernels._codes import SCALE_GROUP


def scaled_linear(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    workspace: Tensor,  # noqa: ARG001 - sums in fp64 need no order
) -> None:
    """Fill out with the product, rounded once."""
    product = _values(x, x_scale) @ _values(weight, weight_scale).T
    out.copy_(product if bias is None else product + bias.double())


def _values(codes: Tensor, scale: Tensor) -> Tensor:
    """Return codes times their scales, in fp64."""
    rows, columns = codes.shape
    if scale.shape[1] > 1 or len(scale) not in (1, rows):
        scale = scale.repeat_interleave(SCALE_GROUP, dim=1)[:, :columns]
    if len(scale) not in (1, rows):
        scale = scale.repeat_interleave(SCALE_GROUP, dim=0)[:rows]
    return codes.double() * scale.double()
