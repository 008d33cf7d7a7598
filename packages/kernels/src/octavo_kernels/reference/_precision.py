"""The dtype in which the reference computes."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Return x in fp64 if it is fp64, else in fp32."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)
