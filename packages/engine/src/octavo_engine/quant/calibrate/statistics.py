"""InputStatistics: what a linear's calibration inputs are like, gathered batch by batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_MOST_OF_MEDIAN = 10.0


class InputStatistics(NamedTuple):
    """hessian [in_features, in_features] fp64, the tokens' mean outer product; mean_abs [in_features] fp32.

    In some linears the first token of a sequence has inputs a thousand times as large as all others (massive
    activations, arXiv 2402.17762). Their squares would be all that a Hessian says, though the next norm divides them
    away. So no token counts for more there than ten times the median of the tokens' squared norms: larger ones are
    shrunk to that. The mean of magnitudes is of all inputs as they are.
    """

    hessian: Tensor
    mean_abs: Tensor

    @classmethod
    def of(cls, batches: Sequence[Tensor]) -> InputStatistics:
        """Gather inputs, each [num_tokens, in_features]; they are not modified."""
        squares = [x.float().square().sum(dim=1) for x in batches]
        most = _MOST_OF_MEDIAN * float(torch.cat(squares).median()) or math.inf
        num_inputs = batches[0].shape[1]
        hessian = torch.zeros(num_inputs, num_inputs, dtype=torch.float64)
        total, num_tokens = torch.zeros(num_inputs), 0
        for x, square in zip(batches, squares, strict=True):
            x = x.float()
            total += x.abs().sum(dim=0)
            num_tokens += len(x)
            if bool((square > most).any()):
                x = x * torch.where(square > most, most / square, 1.0).sqrt()[:, None]
            hessian += x.T @ x
        return cls(hessian / num_tokens, total / num_tokens)
