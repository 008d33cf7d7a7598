"""Unquantized: weights in the dtype of the activations, whatever they were stored in, multiplied by torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo_engine.quant.base import QuantMethod, Shard, WeightSlot
from octavo_engine.quant.onednn import can_pack, linear, pack


class DenseParameters(NamedTuple):
    """weight [out_features, in_features], packed for oneDNN once finished; bias [out_features] or None."""

    weight: Tensor
    bias: Tensor | None


class Unquantized(QuantMethod[DenseParameters]):
    """What serves on a GPU, and on a CPU without native kernels or with activations that are not fp32.

    Args:
        batch_invariant: whether, on a CPU, a row's product may not depend on the rows beside it.
    """

    def __init__(self, *, batch_invariant: bool = True) -> None:
        self._batch_invariant = batch_invariant

    def create(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> DenseParameters:
        """Allocate weight and bias in `dtype`."""
        weight = torch.empty((out_features, in_features), dtype=dtype, device=device)
        return DenseParameters(weight, torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def slots(self, parameters: DenseParameters, shards: Sequence[Shard], prefix: str) -> Iterator[WeightSlot]:
        """Yield `<prefix><shard>.weight` and `.bias`, each a view of the shard's rows."""
        start = 0
        for shard in shards:
            rows = slice(start, start + shard.num_rows)
            yield WeightSlot.into(f"{prefix}{shard.name}.weight", parameters.weight[rows])
            if parameters.bias is not None:
                yield WeightSlot.into(f"{prefix}{shard.name}.bias", parameters.bias[rows])
            start = rows.stop

    def finish(self, parameters: DenseParameters) -> DenseParameters:
        """Pack the weight where torch multiplies packed weights faster, as a copy; without it nothing changes."""
        return parameters._replace(weight=pack(parameters.weight)) if can_pack(parameters.weight) else parameters

    def finish_table(self, parameters: DenseParameters) -> DenseParameters:
        """Leave the weight as it is, since a lookup reads plain rows."""
        return parameters

    def apply(self, parameters: DenseParameters, x: Tensor, out: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Multiply with torch's own product, in new memory."""
        return linear(x, parameters.weight, parameters.bias, batch_invariant=self._batch_invariant)

    def embed(self, parameters: DenseParameters, token_ids: Tensor) -> Tensor:
        """Look up plain rows."""
        return F.embedding(token_ids, parameters.weight)

    def argmax(self, parameters: DenseParameters, x: Tensor) -> tuple[Tensor, Tensor]:
        """Make the product whole, then look for its largest."""
        best, ids = self.apply(parameters, x).float().max(dim=-1)
        return ids, best
