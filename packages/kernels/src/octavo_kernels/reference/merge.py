"""The union of two partial attention results."""

import torch
from torch import Tensor

from octavo_kernels.reference._precision import widen


def merge_states(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    """Weigh each side by exp(lse - joint lse); a side at -inf counts as zero."""
    joint = torch.logaddexp(lse_a, lse_b)
    total = torch.zeros_like(widen(o_a))
    for o, side in ((o_a, lse_a), (o_b, lse_b)):
        empty = side == float("-inf")
        share = torch.where(empty, 0.0, torch.exp(side - joint))
        total += torch.where(empty[..., None], 0.0, widen(o) * share[..., None])
    out.copy_(total)
    lse.copy_(joint)
