"""Products by integer weights and activations in floating point (W4A16, W8A16).

Each output is reduced in an order that depends on in_features and out_features alone: the inputs are cut into spans by
the shape of the weight, never by the number of rows, and the spans' sums are added in order.
"""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation
from octavo_kernels._spans import spans_workspace
from octavo_kernels._workspace import check_workspace
from octavo_kernels.int_weight import IntWeight


def weight_only_linear(
    x: Tensor,
    weight: IntWeight,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Return x times the transposed weight, plus the bias.

    Codes less their zeros are whole numbers that every dtype of x holds, so the products are exact in fp32; scales and
    minimums are applied to the sums of a group, and the result is rounded once. (The layout of the weight follows what
    GPTQ, arXiv 2210.17323, and AWQ, arXiv 2306.00978, store; the cut of the inputs is that of arXiv 2402.00025, in
    fixed order.)

    Args:
        x: [num_tokens, in_features] fp32, fp16 or bf16; the stride of rows is free.
        weight: made by an `int_weight_from_...`.
        bias: [out_features], a floating dtype, or None.
        out: [num_tokens, out_features] in the dtype of x, the stride of rows is free; allocated when None.
        workspace: memory for the sums of spans, [at least weight_only_workspace(num_tokens, weight)] uint8, which the
            call overwrites; allocated when None.

    Returns:
        out.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit.

    """
    op = "weight_only_linear"
    device = _check.same_device(op, x=x, weight=weight.words, bias=bias, out=out, workspace=workspace)
    _check.shape(op, "x", x, ("num_tokens", weight.in_features))
    _check.floating(op, x=x)
    _check.last_dim_contiguous(op, x=x)
    if bias is not None:
        _check.shape(op, "bias", bias, (weight.out_features,))
        _check.floating(op, bias=bias)
        _check.last_dim_contiguous(op, bias=bias)
    shape = (len(x), weight.out_features)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=device)
    _check.shape(op, "out", out, shape)
    _check.dtype(op, "out", out, x.dtype)
    _check.last_dim_contiguous(op, out=out)
    workspace = check_workspace(op, workspace, weight_only_workspace(len(x), weight), device)
    if len(x):
        implementation(op, device)(x, weight, bias, out, workspace)
    return out


def weight_only_workspace(num_tokens: int, weight: IntWeight) -> int:
    """Return the bytes of workspace that `weight_only_linear` wants for so many tokens, 0 where it needs none."""
    return spans_workspace(num_tokens, weight.out_features, weight.num_blocks)
