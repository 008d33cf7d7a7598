"""Products by grouped weights: their values, and sums in fp64."""

import torch
from torch import Tensor

from octavo_kernels.grouped_packing import unpack_grouped
from octavo_kernels.grouped_weight import GroupedWeight


def grouped_linear(x: Tensor, weight: GroupedWeight, bias: Tensor | None, out: Tensor) -> None:
    """Fill out with the product, rounded once."""
    product = x.double() @ unpack_grouped(weight).double().T
    out.copy_(product if bias is None else product + bias.double())


def grouped_argmax(x: Tensor, weight: GroupedWeight, ids: Tensor, best: Tensor) -> None:
    """Fill ids and best from the products, each rounded to fp32 as `grouped_linear` rounds it."""
    products = torch.empty((len(x), weight.out_features), device=x.device)
    grouped_linear(x, weight, None, products)
    best.copy_(products.amax(dim=-1))  # NaN if any is
    ids.copy_((products == best[:, None]).to(torch.uint8).argmax(dim=-1))
