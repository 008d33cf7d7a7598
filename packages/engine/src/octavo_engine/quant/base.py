"""QuantMethod: how a matrix of a model is held and multiplied; WeightSlot: where a checkpoint's tensor goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from octavo_engine.weights.quantized import QuantizedTensor
from octavo_engine.weights.stored import StoredTensor
from octavo_kernels import sample_tokens


class Shard(NamedTuple):
    """One of the checkpoint's linears in a fused one: its name, such as `q_proj`, and its rows of the weight."""

    name: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """Where one tensor of a checkpoint goes.

    `fill` takes it once, in the shape that is expected: floating values, or for a matrix also the bytes of a quantised
    one. It may keep the tensor until the model is finished, and never writes to it.
    """

    name: str
    shape: tuple[int, ...]
    fill: Callable[[Tensor | StoredTensor | QuantizedTensor], None]

    @classmethod
    def into(cls, name: str, target: Tensor) -> WeightSlot:
        """Make a slot that copies the values into a parameter, converted to its dtype."""

        def copy(tensor: Tensor | StoredTensor | QuantizedTensor) -> None:
            target.copy_(tensor if isinstance(tensor, Tensor) else tensor.values())

        return cls(name, tuple(target.shape), copy)

    @property
    def num_parameters(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)


P = TypeVar("P")


class QuantMethod(Protocol[P]):
    """Makes the parameters of a matrix, says where a checkpoint's tensors go in them, and computes with them.

    A matrix serves a linear layer, the embedding, or both and the output head.
    """

    def create(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device) -> P:
        """Make the parameters of one matrix, not filled."""
        ...

    def slots(self, parameters: P, shards: Sequence[Shard], prefix: str) -> Iterator[WeightSlot]:
        """Yield the slots of a matrix whose rows are those of `shards`, one after the other."""
        ...

    def finish(self, parameters: P) -> P:
        """Bring filled parameters into the form that multiplies fastest; they have no slots afterwards."""
        ...

    def finish_table(self, parameters: P) -> P:
        """Bring filled parameters into a form that `embed` reads, and that `finish` takes as it takes filled ones."""
        ...

    def finish_head(self, parameters: P) -> P:
        """Bring filled parameters, or a finished table, into the form that `argmax` reads fastest."""
        return self.finish(parameters)

    def apply(self, parameters: P, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the product: x [num_tokens, in_features] -> [num_tokens, out_features], in x's dtype.

        `out`, [num_tokens, out_features] fp32, is memory that the result may lie in.
        """
        ...

    def embed(self, parameters: P, token_ids: Tensor) -> Tensor:
        """Return rows of a finished table: token_ids [num_tokens] int64 -> [num_tokens, in_features]."""
        ...

    def argmax(self, parameters: P, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return where each row's product is largest, the lowest of equals, and that product in fp32.

        x [num_tokens, in_features] -> [num_tokens] int64, [num_tokens] fp32; the product is NaN if any of the row is.
        """
        ...

    def draw(self, parameters: P, x: Tensor, out: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        """Return `sample_tokens` of the products and some options, none of which is a filter.

        `out`, [num_tokens, out_features] fp32, is memory that may be overwritten.
        """
        return sample_tokens(self.apply(parameters, x, out).float(), **options)
