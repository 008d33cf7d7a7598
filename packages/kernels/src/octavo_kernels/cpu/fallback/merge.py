"""The union of two partial attention results by one sigmoid."""

import torch
from torch import Tensor


def merge_states(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    """Interpolate from a to b by b's share, sigmoid(lse_b - lse_a)."""
    wide = torch.float64 if o_a.dtype == torch.float64 else torch.float32
    empty_a, empty_b = lse_a == float("-inf"), lse_b == float("-inf")
    # -inf minus -inf is NaN: both empty counts as an even share of two zeroed sides.
    share_b = torch.sigmoid(torch.where(empty_a & empty_b, 0.0, lse_b - lse_a)).to(wide)
    left = o_a.to(wide).masked_fill(empty_a[..., None], 0.0)
    right = o_b.to(wide).masked_fill(empty_b[..., None], 0.0)
    joint = torch.logaddexp(lse_a, lse_b)
    out.copy_(torch.lerp(left, right, share_b[..., None]))
    lse.copy_(joint)
