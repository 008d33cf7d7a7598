"""Quantized: matrices of a quantised checkpoint, shards in their own formats, and others as another method has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo_engine.quant.base import QuantMethod, Shard, WeightSlot
from octavo_engine.quant.blocks import as_blocks, blocks_are_as_small
from octavo_engine.quant.grouped import GroupedProduct
from octavo_engine.quant.packed import Packed
from octavo_engine.quant.products import Product, make_product
from octavo_engine.weights.grouped_integers import GroupedIntegers
from octavo_engine.weights.quantized import QuantizedTensor
from octavo_engine.weights.stored import StoredTensor
from octavo_kernels import empty_result

_Weight = Tensor | StoredTensor | QuantizedTensor


class QuantizedPart(NamedTuple):
    """Some shards of a matrix: how they are multiplied, and which columns of the product they make."""

    product: Product | DenseProduct
    columns: slice

    @property
    def writes_columns(self) -> bool:
        """Whether the product takes memory for its result, and so can be recorded, from native methods."""
        return isinstance(self.product, GroupedProduct | DenseProduct)


@dataclass(frozen=True, slots=True)
class QuantizedParameters:
    """A matrix in the making, and finished.

    stored: by the first row, the shards' tensors as they came; `finish` takes them out. biases: likewise.
    bias: [out_features], or None, once finished.
    dense: the other method's parameters, of a matrix without quantised shards; its bias is in them.
    parts: of other matrices, in the order of their rows.
    """

    in_features: int
    out_features: int
    has_bias: bool
    dtype: torch.dtype
    device: torch.device
    stored: dict[int, _Weight] = field(default_factory=dict)
    biases: dict[int, Tensor] = field(default_factory=dict)
    bias: Tensor | None = None
    dense: Any = None
    parts: tuple[QuantizedPart, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes that the parts with codes take."""
        return sum(part.product.num_bytes for part in self.parts if not isinstance(part.product, DenseProduct))


class DenseProduct:
    """Shards that are not quantised, as another method multiplies them, without their bias."""

    def __init__(self, method: QuantMethod[Any], parameters: Any) -> None:
        self._method = method
        self._parameters = parameters

    def __call__(self, x: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Return the product, plus the bias; `out` is memory that it may lie in."""
        product = self._method.apply(self._parameters, x, out)
        return product if bias is None else product.add_(bias)


class Quantized(QuantMethod[QuantizedParameters]):
    """What serves for the linears of a quantised checkpoint; matrices that it has no codes of are another method's.

    Shards whose values GGUF's blocks hold exactly, and in as little memory, become such, if the other method multiplies
    these natively; others stay in their codes.

    Args:
        dense: that method.
        batch_invariant: whether, on a CPU, a row's product may not depend on the rows beside it.
    """

    def __init__(self, dense: QuantMethod[Any], *, batch_invariant: bool = True) -> None:
        self._dense = dense
        self._batch_invariant = batch_invariant

    def create(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> QuantizedParameters:
        """Note what is wanted: only the checkpoint tells in what form the matrix comes."""
        return QuantizedParameters(in_features, out_features, bias, dtype, device)

    def slots(self, parameters: QuantizedParameters, shards: Sequence[Shard], prefix: str) -> Iterator[WeightSlot]:
        """Yield `<prefix><shard>.weight` and `.bias`."""
        start = 0
        for shard in shards:
            keep = partial(parameters.stored.__setitem__, start)
            yield WeightSlot(f"{prefix}{shard.name}.weight", (shard.num_rows, parameters.in_features), keep)
            if parameters.has_bias:
                keep_bias: Callable[[Any], None] = partial(parameters.biases.__setitem__, start)
                yield WeightSlot(f"{prefix}{shard.name}.bias", (shard.num_rows,), keep_bias)
            start += shard.num_rows

    def finish(self, parameters: QuantizedParameters) -> QuantizedParameters:
        """Make the products of what the slots brought."""
        return self._finish(parameters, self._dense.finish)

    def finish_head(self, parameters: QuantizedParameters) -> QuantizedParameters:
        """As `finish`, but what the other method gets is a head."""
        return self._finish(parameters, self._dense.finish_head)

    def _finish(self, parameters: QuantizedParameters, finish_dense: Callable[[Any], Any]) -> QuantizedParameters:
        if parameters.parts:
            return parameters
        if parameters.dense is not None:  # a table, which may be multiplied by too
            return replace(parameters, dense=finish_dense(parameters.dense))
        in_order = [self._native(parameters.stored[start]) for start in sorted(parameters.stored)]
        if not any(isinstance(tensor, QuantizedTensor) for tensor in in_order):
            return self._finished(parameters, dense=finish_dense(self._fill(parameters, in_order, with_bias=True)))
        parts: list[QuantizedPart] = []
        start = 0
        for is_quantized, run in groupby(in_order, key=lambda tensor: isinstance(tensor, QuantizedTensor)):
            tensors = list(run)
            joined = self._quantized(parameters, tensors) if is_quantized else [self._dense_part(parameters, tensors)]
            for product, num_rows in joined:
                parts.append(QuantizedPart(product, slice(start, start + num_rows)))
                start += num_rows
        bias = self._bias(parameters) if parameters.has_bias else None
        return self._finished(parameters, bias=bias, parts=tuple(parts))

    def finish_table(self, parameters: QuantizedParameters) -> QuantizedParameters:
        """Bring the matrix into the other method's form: lookups read plain rows, so codes are expanded."""
        in_order = [parameters.stored[start] for start in sorted(parameters.stored)]
        expanded = [tensor.values() if isinstance(tensor, QuantizedTensor) else tensor for tensor in in_order]
        dense = self._dense.finish_table(self._fill(parameters, expanded, with_bias=True))
        return self._finished(parameters, dense=dense)

    def apply(self, parameters: QuantizedParameters, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply each part; `out` serves where no shard is quantised."""
        if parameters.dense is not None:
            return self._dense.apply(parameters.dense, x, out)
        biases = [None if parameters.bias is None else parameters.bias[part.columns] for part in parameters.parts]
        if isinstance(self._dense, Packed) and all(part.writes_columns for part in parameters.parts):
            if out is None:
                out = empty_result((len(x), parameters.out_features), x.dtype, x.device)
            for (product, columns), bias in zip(parameters.parts, biases, strict=True):
                assert isinstance(product, GroupedProduct | DenseProduct)
                product(x, bias, out[:, columns])
            return out
        products = [part.product(x, bias) for part, bias in zip(parameters.parts, biases, strict=True)]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    def embed(self, parameters: QuantizedParameters, token_ids: Tensor) -> Tensor:
        """Look up rows as the other method does."""
        return self._dense.embed(parameters.dense, token_ids)

    def argmax(self, parameters: QuantizedParameters, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the arg-max as the other method finds it, or of the whole product."""
        if parameters.dense is not None:
            return self._dense.argmax(parameters.dense, x)
        if len(parameters.parts) == 1 and not parameters.has_bias:
            (part,) = parameters.parts
            if isinstance(part.product, GroupedProduct):
                return part.product.argmax(x)
        best, ids = self.apply(parameters, x).float().max(dim=-1)
        return ids, best

    def draw(
        self, parameters: QuantizedParameters, x: Tensor, out: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Draw as the other method does, or from the whole product."""
        if parameters.dense is not None:
            return self._dense.draw(parameters.dense, x, out, **options)
        return super().draw(parameters, x, out, **options)

    def _native(self, tensor: _Weight) -> _Weight:
        """Return a shard in a form that the other method multiplies natively, if there is one that means the same.

        It may be larger than the shard where inputs are to be rounded, which products by other codes do not do.
        """
        if not isinstance(tensor, GroupedIntegers) or not isinstance(self._dense, Packed):
            return tensor
        if not self._dense.int8_activations and not blocks_are_as_small(tensor):
            return tensor
        return as_blocks(tensor) or tensor

    def _finished(self, parameters: QuantizedParameters, **changed: Any) -> QuantizedParameters:
        return replace(parameters, stored={}, biases={}, **changed)

    def _quantized(self, parameters: QuantizedParameters, tensors: list[Any]) -> Iterator[tuple[Product, int]]:
        for tensor in tensors:
            native = isinstance(self._dense, Packed)
            product = make_product(tensor, parameters.device, batch_invariant=self._batch_invariant, native=native)
            yield product, tensor.shape[0]

    def _dense_part(self, parameters: QuantizedParameters, tensors: list[Any]) -> tuple[DenseProduct, int]:
        filled = self._fill(parameters, tensors, with_bias=False)
        return DenseProduct(self._dense, self._dense.finish(filled)), sum(len_of(tensor) for tensor in tensors)

    def _fill(self, parameters: QuantizedParameters, tensors: list[Any], *, with_bias: bool) -> Any:
        """Return the other method's parameters, filled with some shards."""
        shards = [Shard(str(index), len_of(tensor)) for index, tensor in enumerate(tensors)]
        bias = with_bias and parameters.has_bias
        made = self._dense.create(
            parameters.in_features,
            sum(shard.num_rows for shard in shards),
            bias=bias,
            dtype=parameters.dtype,
            device=parameters.device,
        )
        given: dict[str, Any] = {f"{index}.weight": tensor for index, tensor in enumerate(tensors)}
        if bias:
            in_order = [parameters.biases[start] for start in sorted(parameters.biases)]
            given |= {f"{index}.bias": tensor for index, tensor in enumerate(in_order)}
        for slot in self._dense.slots(made, shards, ""):
            slot.fill(given[slot.name])
        return made

    def _bias(self, parameters: QuantizedParameters) -> Tensor:
        in_order = [parameters.biases[start] for start in sorted(parameters.biases)]
        return torch.cat(in_order).to(parameters.device, parameters.dtype)


def len_of(tensor: _Weight) -> int:
    """Return how many rows a shard has."""
    return tensor.shape[0]
