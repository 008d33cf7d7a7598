"""Float32 weights packed for oneDNN: torch's faster product on a CPU, and where it cannot be had, the plain one.

torch multiplies float32 matrices on a CPU by MKL, which does not use all that every maker's processors have; its
oneDNN does, on weights that were rearranged once. The operators are those that torch's own compiler emits. They have no
promise of stability, so their absence is looked for, and then nothing is packed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [rows, in_features] times a weight, packed or not: [rows, out_features].

    Its last bits depend on the number of rows, so a token's logits may differ in the last bits between batches.
    Padding the rows would make them equal and cost time; whoever wants that chooses it here, in this one place.
    """
    if weight.layout is torch.strided:
        return F.linear(x, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
