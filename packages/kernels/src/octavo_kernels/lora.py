"""Low-rank adapters of many kinds in one batch (LoRA, arXiv 2106.09685): shrink to an adapter's rank, and expand.

Both products are grouped by adapter (Punica's SGMV, arXiv 2310.18547): `group_rows` sorts the tokens once per step, and
tokens without an adapter are in no group. Sums follow in_features and an adapter's rank alone.
"""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation
from octavo_kernels.recording import empty_result
from octavo_kernels.row_groups import RowGroups

_SPAN = 1024
_MOST_SPANS = 8
_STEP = 64


def lora_shrink(x: Tensor, a: Tensor, groups: RowGroups, ranks: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return x times the transposed `a` of each token's adapter, as sums over spans of inputs.

    Args:
        x: [num_tokens, in_features] fp32, fp16 or bf16; the stride of rows is free.
        a: [num_adapters, max_rank, in_features] fp32, fp16 or bf16, contiguous; rows from an adapter's rank on are not
            read. On a GPU it is rounded to the dtype of x.
        groups: the tokens by adapter, from `group_rows`.
        ranks: [num_adapters] int32, each at most max_rank.
        out: [lora_spans(in_features), num_tokens, max_rank] fp32, contiguous; allocated when None.

    Returns:
        out, whose sum over its first dimension is the product. Tokens of no group and columns from the adapter's rank
        on are not written.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "lora_shrink"
    device = _check.same_device(op, x=x, a=a, rows=groups.rows, groups=groups.groups, ranks=ranks, out=out)
    _check.rank(op, "x", x, ("num_tokens", "in_features"))
    _check.floating(op, x=x, a=a)
    _check.last_dim_contiguous(op, x=x)
    _check.shape(op, "a", a, ("num_adapters", "max_rank", x.shape[1]))
    _check_adapters(op, "a", a, ranks)
    shape = (lora_spans(x.shape[1]), len(x), a.shape[1])
    if out is None:
        out = empty_result(shape, torch.float32, device)
    _check.shape(op, "out", out, shape)
    _check.dtype(op, "out", out, torch.float32)
    _check.contiguous(op, out=out)
    if len(groups.groups):
        implementation(op, device)(x, a, groups, ranks, out)
    return out


def lora_expand(shrunk: Tensor, b: Tensor, groups: RowGroups, ranks: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """Add scale * shrunk times the transposed `b` of each token's adapter to out, in place.

    Args:
        shrunk: [num_spans, num_tokens, max_rank] fp32, from `lora_shrink`; its spans are added in order, and on a GPU
            the sum is rounded to the dtype of b.
        b: [num_adapters, out_features, max_rank] fp32, fp16 or bf16, contiguous; columns from an adapter's rank on are
            not read. On a CPU it may be the transposed view of a contiguous [num_adapters, max_rank, out_features],
            which saves a copy.
        groups: the tokens by adapter, from `group_rows`.
        ranks: [num_adapters] int32, each at most max_rank.
        scales: [num_adapters] fp32, usually alpha / rank.
        out: [num_tokens, out_features], a floating dtype; modified, but for tokens of no group. The stride of rows is
            free, so that it may be some columns of a fused product.

    Returns:
        out.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "lora_expand"
    device = _check.same_device(
        op, shrunk=shrunk, b=b, rows=groups.rows, groups=groups.groups, ranks=ranks, scales=scales, out=out
    )
    _check.rank(op, "shrunk", shrunk, ("num_spans", "num_tokens", "max_rank"))
    _check.dtype(op, "shrunk", shrunk, torch.float32)
    _check.contiguous(op, shrunk=shrunk)
    _check.floating(op, b=b, out=out)
    _check.shape(op, "b", b, ("num_adapters", "out_features", shrunk.shape[2]))
    is_by_rank = device.type == "cpu" and b.dim() == 3 and b.transpose(1, 2).is_contiguous()
    _check_adapters(op, "b", b.transpose(1, 2) if is_by_rank else b, ranks)
    _check.shape(op, "scales", scales, (len(b),))
    _check.dtype(op, "scales", scales, torch.float32)
    _check.shape(op, "out", out, (shrunk.shape[1], b.shape[1]))
    _check.last_dim_contiguous(op, out=out)
    if len(groups.groups) and b.shape[1]:
        implementation(op, device)(shrunk, b, groups, ranks, scales, out)
    return out


def lora_spans(in_features: int) -> int:
    """Return into how many spans `lora_shrink` cuts the inputs, so that few tokens fill a GPU."""
    return max(1, min(_MOST_SPANS, in_features // _SPAN))


def lora_span_inputs(in_features: int) -> int:
    """Return the inputs of a span, the last ones perhaps fewer."""
    return -(-in_features // (lora_spans(in_features) * _STEP)) * _STEP


def _check_adapters(op: str, name: str, weights: Tensor, ranks: Tensor) -> None:
    _check.contiguous(op, **{name: weights}, ranks=ranks)
    _check.shape(op, "ranks", ranks, (len(weights),))
    _check.dtype(op, "ranks", ranks, torch.int32)
