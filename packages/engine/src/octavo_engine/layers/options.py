"""LayerOptions: what every layer of a model is made with, so that a model passes it on and knows nothing of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from octavo_engine.quant.base import QuantMethod
from octavo_engine.quant.unquantized import Unquantized


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """Where weights live, in which dtype activations are, how matrices are held, and who may share a sum.

    With `batch_invariant` a token's bits depend on its own sequence alone, at the cost of time where torch computes.

    Memory for weights is allocated and not initialised: the loader fills it. On device `meta` nothing is allocated, to
    count a model's parameters before loading it.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    quant: QuantMethod[Any] = field(default_factory=Unquantized)
    batch_invariant: bool = True

    def vector(self, size: int) -> torch.Tensor:
        """Allocate a weight [size]."""
        return torch.empty(size, dtype=self.dtype, device=self.device)

    def matrix(self, num_rows: int, num_columns: int, *, bias: bool = False) -> Any:
        """Make the parameters of a matrix [num_rows, num_columns] by the method."""
        return self.quant.create(num_columns, num_rows, bias=bias, dtype=self.dtype, device=self.device)
