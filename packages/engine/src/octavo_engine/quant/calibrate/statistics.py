"""InputStatistics: what a linear's calibration inputs are like, gathered batch by batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class InputStatistics(NamedTuple):
    """Of all tokens: hessian [in_features, in_features] fp64, the mean outer product; mean_abs [in_features] fp32."""

    hessian: Tensor
    mean_abs: Tensor

    @classmethod
    def of(cls, batches: Iterable[Tensor]) -> InputStatistics:
        """Gather inputs, each [num_tokens, in_features]."""
        products, sums, num_tokens = [], [], 0
        for x in batches:
            x = x.float()
            products.append((x.T @ x).double())
            sums.append(x.abs().sum(dim=0))
            num_tokens += len(x)
        hessian = products[0]
        for product in products[1:]:
            hessian += product
        return cls(hessian / num_tokens, torch.stack(sums).sum(dim=0) / num_tokens)
