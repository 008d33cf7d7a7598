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

    What attention projects is another matter: most of it goes to the first token wherever there is nothing to look for
    (attention sinks, arXiv 2309.17453), whose value is then in the outputs of all tokens. There the first tokens
    count, together, as much as all others.
    """

    hessian: Tensor
    mean_abs: Tensor

    @classmethod
    def of(cls, batches: Sequence[Tensor], *, length: int | None = None) -> InputStatistics:
        """Gather inputs, each [num_tokens, in_features]; they are not modified.

        Args:
            batches: whole sequences, one after the other.
            length: tokens of a sequence, where its first one is to count as much as all others; None has them equal.

        """
        squares = [x.float().square().sum(dim=1) for x in batches]
        most = _MOST_OF_MEDIAN * float(torch.cat(squares).median()) or math.inf
        num_inputs = batches[0].shape[1]
        hessian, of_first = (torch.zeros(num_inputs, num_inputs, dtype=torch.float64) for _ in range(2))
        total, num_tokens = torch.zeros(num_inputs), 0
        for x, square in zip(batches, squares, strict=True):
            x = x.float()
            total += x.abs().sum(dim=0)
            num_tokens += len(x)
            if bool((square > most).any()):
                x = x * torch.where(square > most, most / square, 1.0).sqrt()[:, None]
            hessian += x.T @ x
            if length is not None:
                of_first += x[::length].T @ x[::length]
        hessian /= num_tokens
        if length is not None:
            hessian = (hessian + of_first / (num_tokens / length)) / 2
        return cls(hessian, total / num_tokens)
