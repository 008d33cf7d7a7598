"""Products of 8-bit activations by 8-bit weights: FP8 (e4m3) and int8, with scales for rows, outputs and blocks.

Each output is reduced in an order that depends on in_features and out_features alone, as in `weight_only_linear`.
"""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._codes import LARGEST_CODE, SCALE_GROUP
from octavo_kernels._dispatch import implementation
from octavo_kernels._spans import spans_workspace
from octavo_kernels._workspace import check_workspace
from octavo_kernels.errors import ShapeError

_LARGEST_INPUTS = 131_071  # times 128 * 128 is what int32 holds


def scaled_linear(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Return (x * x_scale) times the transposed (weight * weight_scale), plus the bias.

    int8 codes with one scale per row and output are summed in int32, exactly, over each span of inputs. Otherwise 128
    inputs are summed by the tensor cores, and these sums, with their scales, in fp32: Hopper's FP8 products keep about
    14 bits in longer sums (DeepSeek-V3, arXiv 2412.19437, section 3.3).

    Args:
        x: [num_tokens, in_features] int8 or float8_e4m3fn, as `quantize_rows` returns; the stride of rows is free.
        weight: [out_features, in_features] of the same dtype; the stride of rows is free.
        x_scale: fp32: [num_tokens, 1], [num_tokens, in_features / 128 rounded up], or [1, 1] for all.
        weight_scale: fp32: [1, 1] for all, [out_features, 1] per output, or [out_features / 128, in_features / 128],
            both rounded up, for blocks of 128 x 128.
        bias: [out_features], a floating dtype, or None.
        out_dtype: fp32, fp16 or bf16; ignored where out is given.
        out: [num_tokens, out_features] fp32, fp16 or bf16, the stride of rows is free; allocated when None.
        workspace: [at least scaled_workspace(...)] uint8, which the call overwrites; allocated when None.

    Returns:
        out.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "scaled_linear"
    device = _check.same_device(
        op, x=x, weight=weight, x_scale=x_scale, weight_scale=weight_scale, bias=bias, out=out, workspace=workspace
    )
    _check.rank(op, "x", x, ("num_tokens", "in_features"))
    num_tokens, in_features = x.shape
    _check.dtype(op, "x", x, *LARGEST_CODE)
    _check.shape(op, "weight", weight, ("out_features", in_features))
    _check.dtype(op, "weight", weight, x.dtype)
    _check.last_dim_contiguous(op, x=x, weight=weight)
    _check.option(op, "in_features", in_features, 0 < in_features <= _LARGEST_INPUTS, f"1 to {_LARGEST_INPUTS}")
    _check_scales(op, x_scale, weight_scale, num_tokens, weight)
    out_features = len(weight)
    if bias is not None:
        _check.shape(op, "bias", bias, (out_features,))
        _check.floating(op, bias=bias)
        _check.last_dim_contiguous(op, bias=bias)
    if out is None:
        out = torch.empty((num_tokens, out_features), dtype=out_dtype, device=device)
    _check.shape(op, "out", out, (num_tokens, out_features))
    _check.dtype(op, "out", out, torch.float32, torch.float16, torch.bfloat16)
    _check.last_dim_contiguous(op, out=out)
    workspace = check_workspace(op, workspace, scaled_workspace(num_tokens, out_features, in_features), device)
    if out.numel():
        implementation(op, device)(x, weight, x_scale, weight_scale, bias, out, workspace)
    return out


def scaled_workspace(num_tokens: int, out_features: int, in_features: int) -> int:
    """Return the bytes of workspace that `scaled_linear` wants for a product of this shape, 0 where it needs none."""
    return spans_workspace(num_tokens, out_features, -(-in_features // SCALE_GROUP))


def _check_scales(op: str, x_scale: Tensor, weight_scale: Tensor, num_tokens: int, weight: Tensor) -> None:
    out_features, in_features = weight.shape
    groups = -(-in_features // SCALE_GROUP)
    allowed = {
        "x_scale": (x_scale, ((num_tokens, 1), (num_tokens, groups), (1, 1))),
        "weight_scale": (weight_scale, ((1, 1), (out_features, 1), (-(-out_features // SCALE_GROUP), groups))),
    }
    for name, (scale, shapes) in allowed.items():
        _check.dtype(op, name, scale, torch.float32)
        if tuple(scale.shape) not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ShapeError(f"{op}: {name} has shape {list(scale.shape)}, expected {wanted}; pass one of these")
