"""Observed: dense matrices whose inputs somebody sees before they are multiplied."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from octavo_engine.quant.unquantized import DenseParameters, Unquantized

Observer = Callable[[DenseParameters, Tensor], None]
"""Takes a matrix and the inputs [num_tokens, in_features] it is about to be multiplied with."""


class Observed(Unquantized):
    """Weights that stay plain, so that they can be written to between products.

    Attributes:
        observer: called at each product; None lets them pass.
    """

    def __init__(self) -> None:
        super().__init__(batch_invariant=False)
        self.observer: Observer | None = None

    def finish(self, parameters: DenseParameters) -> DenseParameters:
        """Leave the weight as it is."""
        return parameters

    def apply(self, parameters: DenseParameters, x: Tensor, out: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Show the inputs, then multiply."""
        if self.observer is not None:
            self.observer(parameters, x)
        return F.linear(x, parameters.weight, parameters.bias)
