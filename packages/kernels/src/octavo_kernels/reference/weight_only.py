"""Products by integer weights: the values written out, sums in fp64."""

from torch import Tensor

from octavo_kernels.int_weight import IntWeight, int_weight_values


def weight_only_linear(
    x: Tensor,
    weight: IntWeight,
    bias: Tensor | None,
    out: Tensor,
    workspace: Tensor,  # noqa: ARG001 - sums in fp64 need no order
) -> None:
    """Fill out with the product, rounded once."""
    product = x.double() @ int_weight_values(weight).double().T
    out.copy_(product if bias is None else product + bias.double())
