"""Products by grouped weights: those of Hugging Face's quantised formats, from their codes as they are.

Each output is reduced in an order that depends on the weight's shape and groups alone, never on the number of rows, on
where a row stands among them or on threads: a row computed alone equals the same row in any batch, bit for bit.
"""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation
from octavo_kernels.grouped_weight import GroupedWeight
from octavo_kernels.recording import empty_result


def grouped_linear(
    x: Tensor, weight: GroupedWeight, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Return x times the transposed weight, plus the bias.

    Within a group of inputs a product is a chain of fp32 additions of inputs times levels; groups' sums are scaled and
    added in fp32. Inputs are not rounded.

    Args:
        x: [num_tokens, in_features] fp32, fp16 or bf16; the stride of rows is free. Native code is for fp32.
        weight: packed by `pack_grouped`.
        bias: [out_features] fp32, or None.
        out: [num_tokens, out_features] in the dtype of x, the stride of rows is free; allocated when None.

    Returns:
        out.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit.

    Example:
        >>> weight = pack_grouped(GroupedCodes(codes, scales, group_size=64, bits=4, levels=nf4_levels))
        >>> grouped_linear(torch.randn(3, weight.in_features), weight)  # [3, weight.out_features]

    """
    op = "grouped_linear"
    device = _check.same_device(op, x=x, weight=weight.data, bias=bias, out=out)
    _check.shape(op, "x", x, ("num_tokens", weight.in_features))
    _check.dtype(op, "x", x, torch.float32, torch.float16, torch.bfloat16)
    _check.last_dim_contiguous(op, x=x)
    if bias is not None:
        _check.shape(op, "bias", bias, (weight.out_features,))
        _check.dtype(op, "bias", bias, torch.float32)
        _check.last_dim_contiguous(op, bias=bias)
    if out is None:
        out = empty_result((len(x), weight.out_features), x.dtype, device)
    _check.shape(op, "out", out, (len(x), weight.out_features))
    _check.dtype(op, "out", out, x.dtype)
    _check.last_dim_contiguous(op, out=out)
    if len(x):
        implementation(op, device)(x, weight, bias, out)
    return out


def grouped_argmax(x: Tensor, weight: GroupedWeight) -> tuple[Tensor, Tensor]:
    """Return where each row's product is largest, and how large, without keeping the products.

    Args:
        x: [num_tokens, in_features] fp32; the stride of rows is free.
        weight: packed by `pack_grouped`.

    Returns:
        ids: [num_tokens] int64, the lowest index of the largest product.
        best: [num_tokens] fp32, that product. If any product of a row is NaN, its best is NaN, and its id is some
        index.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit.

    """
    op = "grouped_argmax"
    device = _check.same_device(op, x=x, weight=weight.data)
    _check.shape(op, "x", x, ("num_tokens", weight.in_features))
    _check.dtype(op, "x", x, torch.float32)
    _check.last_dim_contiguous(op, x=x)
    ids = empty_result((len(x),), torch.int64, device)
    best = empty_result((len(x),), torch.float32, device)
    if len(x):
        implementation(op, device)(x, weight, ids, best)
    return ids, best
