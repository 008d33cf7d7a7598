"""Float32 weights packed for oneDNN: torch's faster product on a CPU, and where it cannot be had, the plain one.

torch multiplies float32 matrices on a CPU by MKL, which does not use all that every maker's processors have; its
oneDNN does, on weights that were rearranged once. The operators are those that torch's own compiler emits. They have no
promise of stability, so their absence is looked for, and then nothing is packed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_PACKED_ROW_MULTIPLE = 16
_ROWS_AT_ONCE = 32


def can_pack(weight: Tensor) -> bool:
    """Return whether a weight can be packed: float32, on a CPU, with a torch that has the operators."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack(weight: Tensor) -> Tensor:
    """Return a packed copy of a weight [out_features, in_features]; only `linear` can use it."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = True) -> Tensor:
    """Return x [rows, in_features] times a weight, packed or not: [rows, out_features].

    On a CPU the last bits of torch's products depend on how many rows there are. With `batch_invariant` they do not, so
    that a token's logits are the same in every batch. A packed weight's products differ below 16 rows and at broken
    numbers of sixteens alone, which are filled up. Those of a plain weight differ elsewhere too (bfloat16 from 48 rows
    on, float32 from 64), so all of them are made of products of 32 rows.
    """
    if not batch_invariant or x.device.type != "cpu":
        return _multiply(x, weight, bias)
    num_rows = len(x)
    is_packed = weight.layout is not torch.strided
    missing = -num_rows % (_PACKED_ROW_MULTIPLE if is_packed else _ROWS_AT_ONCE)
    filled = F.pad(x, (0, 0, 0, missing)) if missing else x
    if is_packed or len(filled) == _ROWS_AT_ONCE:
        return _multiply(filled, weight, bias)[:num_rows]
    return torch.cat([_multiply(rows, weight, bias) for rows in torch.split(filled, _ROWS_AT_ONCE)])[:num_rows]


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.layout is torch.strided:
        return F.linear(x, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
