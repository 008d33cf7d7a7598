"""QuantMethod: what makes a linear's parameters and its product; Unquantized is the plain one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F


class Shard(NamedTuple):
    """One of the checkpoint's linears in a fused one: its name, such as `q_proj`, and its rows of the weight."""

    name: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """Where one tensor of a checkpoint goes: `target`, a view into a parameter, has the shape that is expected."""

    name: str
    target: Tensor


P = TypeVar("P")


class QuantMethod(Protocol[P]):
    """Makes the parameters of linears, says where a checkpoint's tensors go in them, and multiplies by them."""

    def create(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device) -> P:
        """Allocate the parameters of one linear, not initialised."""
        ...

    def slots(self, parameters: P, shards: Sequence[Shard], prefix: str) -> Iterator[WeightSlot]:
        """Yield the slots of a linear whose output rows are those of `shards`, one after the other."""
        ...

    def apply(self, parameters: P, x: Tensor) -> Tensor:
        """Return the product: x [num_tokens, in_features] -> [num_tokens, out_features], in x's dtype."""
        ...


def empty_weight(out_features: int, in_features: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a weight [out_features, in_features], not initialised, with the strides that torch multiplies best by.

    In float32 on a CPU that is column by column: with one or two rows of activations the product then takes 0.6 to 0.85
    of the time, with more rows the same. Elsewhere it is row by row.
    """
    if device.type == "cpu" and dtype == torch.float32:
        return torch.empty((in_features, out_features), dtype=dtype, device=device).t()
    return torch.empty((out_features, in_features), dtype=dtype, device=device)


class DenseParameters(NamedTuple):
    """weight [out_features, in_features]; bias [out_features] or None."""

    weight: Tensor
    bias: Tensor | None


class Unquantized(QuantMethod[DenseParameters]):
    """Weights as they are, multiplied by torch."""

    def create(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> DenseParameters:
        """Allocate weight and bias in `dtype`."""
        weight = empty_weight(out_features, in_features, dtype=dtype, device=device)
        return DenseParameters(weight, torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def slots(self, parameters: DenseParameters, shards: Sequence[Shard], prefix: str) -> Iterator[WeightSlot]:
        """Yield `<prefix><shard>.weight` and `.bias`, each a view of the shard's rows."""
        start = 0
        for shard in shards:
            rows = slice(start, start + shard.num_rows)
            yield WeightSlot(f"{prefix}{shard.name}.weight", parameters.weight[rows])
            if parameters.bias is not None:
                yield WeightSlot(f"{prefix}{shard.name}.bias", parameters.bias[rows])
            start = rows.stop

    def apply(self, parameters: DenseParameters, x: Tensor) -> Tensor:
        """Multiply with torch's own product.

        Its last bits depend on the number of rows (in float32 on a CPU, 1 to 8 rows are summed in another order than
        64), so a token's logits may differ in the last bits between batches. Padding the rows would make them equal and
        cost time; whoever wants that chooses it here, in this one place.
        """
        return F.linear(x, parameters.weight, parameters.bias)
