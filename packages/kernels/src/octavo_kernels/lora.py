"""Low-rank adapters of many kinds in one batch (LoRA, arXiv 2106.09685): shrink to an adapter's rank, and expand.

Both products are grouped by adapter (Punica's SGMV, arXiv 2310.18547): `group_rows` sorts the tokens once per step, and
tokens without an adapter are in no group. Sums follow in_features and an adapter's rank alone. `lora_linear` is both
products in one call, for all linears that lie side by side in one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation
from octavo_kernels.recording import empty_result
from octavo_kernels.row_groups import RowGroups

_SPAN = 1024
_MOST_SPANS = 8
_STEP = 64


class LoraPart(NamedTuple):
    """The adapters of one of the linears that lie side by side in a product.

    a: [num_adapters, max_rank, in_features], as for `lora_shrink`.
    b: [num_adapters, out_features, max_rank], as for `lora_expand`.
    ranks: [num_adapters] int32, each at most max_rank; 0 adds nothing.
    scales: [num_adapters] fp32.
    first_column: of the product, where this linear's outputs begin.
    factors: [num_adapters, out_features] fp32, contiguous, which the sum of the base's product and an adapter's is
        multiplied by where the adapter's rank is not 0 (the magnitudes of DoRA, arXiv 2402.09353, over the norms of
        the sum of weights; no bias may be among the base's product then); None multiplies nothing.
    """

    a: Tensor
    b: Tensor
    ranks: Tensor
    scales: Tensor
    first_column: int = 0
    factors: Tensor | None = None

    @property
    def columns(self) -> slice:
        """The linear's columns of the product."""
        return slice(self.first_column, self.first_column + self.b.shape[1])


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
    _check_inputs(op, x)
    _check_a(op, a, x, ranks)
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
    _check_b(op, b, shrunk.shape[2], ranks, scales)
    _check.floating(op, out=out)
    _check.shape(op, "out", out, (shrunk.shape[1], b.shape[1]))
    _check.last_dim_contiguous(op, out=out)
    if len(groups.groups) and b.shape[1]:
        implementation(op, device)(shrunk, b, groups, ranks, scales, out)
    return out


def lora_linear(
    x: Tensor, parts: Sequence[LoraPart], groups: RowGroups, out: Tensor, *, shrunk: Tensor | None = None
) -> Tensor:
    """Add what each token's adapter makes of x to out, in place: `lora_shrink` and `lora_expand` for every part.

    A part with factors multiplies its columns by them afterwards. The result has the bits of the two ops. On a CPU
    it is one call of native code with two loops, whatever the number of parts.

    Args:
        x: [num_tokens, in_features], as for `lora_shrink`.
        parts: at least one; all have one max_rank, and their matrices one dtype.
        groups: the tokens by adapter, from `group_rows`.
        out: [num_tokens, at least the columns of all parts], as for `lora_expand`.
        shrunk: [num_parts, lora_spans(in_features), num_tokens, max_rank] fp32, contiguous, overwritten; allocated
            when None.

    Returns:
        out.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "lora_linear"
    _check.option(op, "len(parts)", len(parts), len(parts) > 0, "at least 1")
    device = _check.same_device(op, x=x, rows=groups.rows, groups=groups.groups, out=out, shrunk=shrunk)
    _check_inputs(op, x)
    first = parts[0]
    _check.rank(op, "a", first.a, ("num_adapters", "max_rank", "in_features"))
    for part in parts:
        _check.same_device(op, x=x, a=part.a, b=part.b, ranks=part.ranks, scales=part.scales, factors=part.factors)
        _check_a(op, part.a, x, part.ranks)
        _check_b(op, part.b, first.a.shape[1], part.ranks, part.scales)
        _check.shape(op, "a", part.a, tuple(first.a.shape))
        _check.option(op, "first_column", part.first_column, part.first_column >= 0, "0 or more")
        if part.factors is not None:
            _check.shape(op, "factors", part.factors, tuple(part.b.shape[:2]))
            _check.dtype(op, "factors", part.factors, torch.float32)
            _check.contiguous(op, factors=part.factors)
        _check.dtype(op, "a", part.a, first.a.dtype)
        _check.dtype(op, "b", part.b, first.b.dtype)
    _check.floating(op, out=out)
    _check.rank(op, "out", out, ("num_tokens", "columns"))
    columns = max(part.columns.stop for part in parts)
    _check.option(op, "columns", columns, columns <= out.shape[1], f"at most the {out.shape[1]} of out")
    _check.shape(op, "out", out, (len(x), out.shape[1]))
    _check.last_dim_contiguous(op, out=out)
    shape = (len(parts), lora_spans(x.shape[1]), len(x), first.a.shape[1])
    if shrunk is None:
        shrunk = empty_result(shape, torch.float32, device)
    _check.shape(op, "shrunk", shrunk, shape)
    _check.dtype(op, "shrunk", shrunk, torch.float32)
    _check.contiguous(op, shrunk=shrunk)
    if len(groups.groups):
        implementation(op, device)(x, parts, groups, out, shrunk)
    return out


def lora_spans(in_features: int) -> int:
    """Return into how many spans `lora_shrink` cuts the inputs, so that few tokens fill a GPU."""
    return max(1, min(_MOST_SPANS, in_features // _SPAN))


def lora_span_inputs(in_features: int) -> int:
    """Return the inputs of a span, the last ones perhaps fewer."""
    return -(-in_features // (lora_spans(in_features) * _STEP)) * _STEP


def _check_inputs(op: str, x: Tensor) -> None:
    _check.rank(op, "x", x, ("num_tokens", "in_features"))
    _check.floating(op, x=x)
    _check.last_dim_contiguous(op, x=x)


def _check_a(op: str, a: Tensor, x: Tensor, ranks: Tensor) -> None:
    _check.floating(op, a=a)
    _check.shape(op, "a", a, ("num_adapters", "max_rank", x.shape[1]))
    _check_adapters(op, "a", a, ranks)


def _check_b(op: str, b: Tensor, max_rank: int, ranks: Tensor, scales: Tensor) -> None:
    _check.floating(op, b=b)
    _check.shape(op, "b", b, ("num_adapters", "out_features", max_rank))
    is_by_rank = b.device.type == "cpu" and b.transpose(1, 2).is_contiguous()
    _check_adapters(op, "b", b.transpose(1, 2) if is_by_rank else b, ranks)
    _check.shape(op, "scales", scales, (len(b),))
    _check.dtype(op, "scales", scales, torch.float32)


def _check_adapters(op: str, name: str, weights: Tensor, ranks: Tensor) -> None:
    _check.contiguous(op, **{name: weights}, ranks=ranks)
    _check.shape(op, "ranks", ranks, (len(weights),))
    _check.dtype(op, "ranks", ranks, torch.int32)
