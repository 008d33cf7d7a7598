"""apply_token_bitmask in batched torch: all masks unpacked at once."""

import math

import torch
from torch import Tensor


def apply_token_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor | None) -> None:
    """Remove the tokens whose bit is 0."""
    bits = torch.arange(32, dtype=torch.int32, device=bitmask.device)
    forbidden = ((bitmask[:, :, None] >> bits) & 1 == 0).flatten(1)[:, : logits.shape[1]]
    if rows is None:
        logits.masked_fill_(forbidden, -math.inf)
    else:
        logits[rows] = logits[rows].masked_fill(forbidden, -math.inf)
