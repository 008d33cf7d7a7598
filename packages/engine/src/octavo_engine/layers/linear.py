"""Linear: one matrix product for one or several of a checkpoint's linears."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from octavo_engine.layers.linear_adapters import LinearAdapters
from octavo_engine.layers.options import LayerOptions
from octavo_engine.quant.base import QuantMethod, Shard, WeightSlot


class Linear:
    """A linear layer, possibly fused: the rows of its weight are those of its shards, one after the other.

    The query, key and value projections are one Linear with three shards, gate and up one with two.

    Args:
        in_features: columns of the weight.
        shards: the checkpoint's linears and their rows.
        bias: whether each shard has a bias.
        options: how the weights are made.

    Attributes:
        adapters: what adapters add to the product; None where none are served.
    """

    __slots__ = ("_options", "_quant", "adapters", "has_bias", "in_features", "parameters", "shards")

    def __init__(self, in_features: int, shards: Sequence[Shard], *, bias: bool, options: LayerOptions) -> None:
        self.in_features = in_features
        self.has_bias = bias
        self.shards = tuple(shards)
        self.adapters: LinearAdapters | None = None
        self._options = options
        self._quant: QuantMethod[Any] = options.quant
        self.parameters = options.matrix(sum(shard.num_rows for shard in shards), in_features, bias=bias)

    @property
    def bias(self) -> Tensor | None:
        """The biases of all shards, [rows of all shards]; None if there are none."""
        bias: Tensor | None = self.parameters.bias if self.has_bias else None
        return bias

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._options.device

    def finish(self) -> None:
        """Prepare the filled weights for products."""
        self.parameters = self._quant.finish(self.parameters)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x [num_tokens, in_features] times the weight, [num_tokens, rows of all shards]."""
        out = self._quant.apply(self.parameters, x)
        if self.adapters is not None:
            self.adapters.add(x, out)
        return out

    def columns(self, first: int, end: int) -> Tensor:
        """Return columns of the weight, [end - first, rows of all shards] fp32: products by unit vectors."""
        units = torch.zeros(end - first, self.in_features, dtype=self._options.dtype, device=self._options.device)
        units[:, first:end].fill_diagonal_(1.0)
        products = self._quant.apply(self.parameters, units).float()
        return products if self.bias is None else products - self.bias.float()

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of x, which was made of some of the weight's columns, and of what was made of the others."""
        return x

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield where the checkpoint's tensors go; their names begin with `prefix`."""
        return self._quant.slots(self.parameters, self.shards, prefix)
