"""Float32 weights packed for oneDNN: torch's faster product on a CPU, and where it cannot be had, the plain one.

torch multiplies float32 matrices on a CPU by MKL, which does not use all that every maker's processors have; its
oneDNN does, on weights that were rearranged once. The operators are those that torch's own compiler emits. They have no
promise of stability, so their absence is looked for, and then nothing is packed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_ROW_MULTIPLE = 16


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

    On a CPU the last bits of torch's products depend on how many rows there are, if there are fewer than 16 or a broken
    number of sixteens. With `batch_invariant` such rows are filled up, so that a token's logits are the same in every
    batch.
    """
    num_rows = len(x)
    missing = -num_rows % _ROW_MULTIPLE if batch_invariant and x.device.type == "cpu" else 0
    filled = F.pad(x, (0, 0, 0, missing)) if missing else x
    return _multiply(filled, weight, bias)[:num_rows]


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.layout is torch.strided:
        return F.linear(x, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
