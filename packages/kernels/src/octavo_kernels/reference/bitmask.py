"""apply_token_bitmask, one mask at a time."""

import math

import torch
from torch import Tensor


def apply_token_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor | None) -> None:
    """Remove the tokens whose bit is 0."""
    tokens = torch.arange(logits.shape[1], device=logits.device)
    for index, words in enumerate(bitmask):
        allowed = (words[tokens // 32] >> (tokens % 32)) & 1
        logits[index if rows is None else int(rows[index]), allowed == 0] = -math.inf
