"""QuantMethod: what makes a linear's parameters and its product; Unquantized is the plain one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from octavo_engine.quant.packed import can_pack, linear, pack


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

    def finish(self, parameters: P) -> P:
        """Bring filled parameters into the form that multiplies fastest; they have no slots afterwards."""
        ...

    def apply(self, parameters: P, x: Tensor) -> Tensor:
        """Return the product: x [num_tokens, in_features] -> [num_tokens, out_features], in x's dtype."""
        ...


class DenseParameters(NamedTuple):
    """weight [out_features, in_features], packed once finished; bias [out_features] or None."""

    weight: Tensor
    bias: Tensor | None


class Unquantized(QuantMethod[DenseParameters]):
    """Weights in the dtype of the activations, multiplied by torch."""

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
            yield WeightSlot(f"{prefix}{shard.name}.weight", parameters.weight[rows])
            if parameters.bias is not None:
                yield WeightSlot(f"{prefix}{shard.name}.bias", parameters.bias[rows])
            start = rows.stop

    def finish(self, parameters: DenseParameters) -> DenseParameters:
        """Pack the weight where torch multiplies packed weights faster; the memory of the plain one is given back."""
        return parameters._replace(weight=pack(parameters.weight)) if can_pack(parameters.weight) else parameters

    def apply(self, parameters: DenseParameters, x: Tensor) -> Tensor:
        """Multiply with torch's own product; see `packed.linear` for what its last bits depend on."""
        return linear(x, parameters.weight, parameters.bias)
