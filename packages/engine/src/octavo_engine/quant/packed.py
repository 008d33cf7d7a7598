"""Packed: weights on a CPU that stay as the checkpoint stores them, in the panels that native products read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo_engine.quant.base import QuantMethod, Shard, WeightSlot
from octavo_engine.weights.gguf import TensorType
from octavo_engine.weights.stored import StoredTensor
from octavo_kernels import (
    PackedWeight,
    WeightFormat,
    empty_result,
    has_finite_scales,
    pack_weight,
    packed_argmax,
    packed_embedding,
    packed_linear,
    packed_sample,
    weight_norms,
)

BLOCK_FORMATS = MappingProxyType({TensorType[item.name]: item for item in WeightFormat if item.dtype is None})
"""GGUF's types that native products read as they are stored: all block types."""

_DENSE_FORMATS = MappingProxyType({torch.bfloat16: WeightFormat.BF16, torch.float16: WeightFormat.F16})
_BYTES_WORTH_A_NORM = 400  # of an output's weights: its norm takes 1 % as many


class PackedPart(NamedTuple):
    """One weight of a matrix, and the columns of the product that it makes."""

    weight: PackedWeight
    columns: slice
    int8_activations: bool


@dataclass(slots=True)
class PackedParameters:
    """A matrix in the making, and finished.

    stored: by the first row, the shards' tensors as they came; emptied by `finish`. Written by the slots alone.
    parts: the packed weights, in the order of their rows; a matrix whose shards have one format has one part.
    bias: [out_features] fp32, or None.
    norms: of a head's outputs, [out_features] fp32, by which those are told that can be the largest; None elsewhere.
    """

    in_features: int
    out_features: int
    bias: Tensor | None
    stored: dict[int, Tensor | StoredTensor] = field(default_factory=dict)
    parts: tuple[PackedPart, ...] = ()
    norms: Tensor | None = None


class Packed(QuantMethod[PackedParameters]):
    """Lossless weights for activations in fp32: all of GGUF's block types, and f32, bf16 and f16; others become f32.

    Args:
        int8_activations: whether products by block formats round their inputs to 8 bits per group of 32.
    """

    def __init__(self, *, int8_activations: bool = False) -> None:
        self.int8_activations = int8_activations

    def create(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> PackedParameters:
        """Allocate the bias; the weight is what its slots are filled with."""
        assert dtype == torch.float32
        return PackedParameters(in_features, out_features, torch.empty(out_features, device=device) if bias else None)

    def slots(self, parameters: PackedParameters, shards: Sequence[Shard], prefix: str) -> Iterator[WeightSlot]:
        """Yield `<prefix><shard>.weight` and `.bias`."""
        start = 0
        for shard in shards:
            shape = (shard.num_rows, parameters.in_features)
            yield WeightSlot(f"{prefix}{shard.name}.weight", shape, partial(parameters.stored.__setitem__, start))
            if parameters.bias is not None:
                rows = slice(start, start + shard.num_rows)
                yield WeightSlot.into(f"{prefix}{shard.name}.bias", parameters.bias[rows])
            start += shard.num_rows

    def finish(self, parameters: PackedParameters) -> PackedParameters:
        """Pack what the slots brought: neighbours of one format as one weight. Nothing is left to do a second time."""
        if parameters.parts:
            return parameters
        in_order = [parameters.stored[start] for start in sorted(parameters.stored)]
        parts: list[PackedPart] = []
        start = 0
        for weight_format, run in groupby(in_order, key=_format_of):
            weight = pack_shards(list(run), weight_format, parameters.in_features)
            int8 = self.int8_activations and weight_format.dtype is None
            parts.append(PackedPart(weight, slice(start, start + weight.out_features), int8))
            start += weight.out_features
        return PackedParameters(parameters.in_features, parameters.out_features, parameters.bias, parts=tuple(parts))

    def finish_table(self, parameters: PackedParameters) -> PackedParameters:
        """Pack as for products: lookups read the same bytes."""
        return self.finish(parameters)

    def finish_head(self, parameters: PackedParameters) -> PackedParameters:
        """Pack, and look at the norms of the outputs where products go by them."""
        finished = self.finish(parameters)
        (part,) = finished.parts
        return replace(finished, norms=weight_norms(part.weight)) if _is_screened(part) else finished

    def apply(self, parameters: PackedParameters, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply natively, into `out` if given; each part writes its columns."""
        if len(parameters.parts) == 1:
            ((weight, _, int8),) = parameters.parts
            return packed_linear(x, weight, parameters.bias, int8_activations=int8, out=out)
        if out is None:
            out = empty_result((len(x), parameters.out_features), x.dtype, x.device)
        for weight, columns, int8 in parameters.parts:
            bias = None if parameters.bias is None else parameters.bias[columns]
            packed_linear(x, weight, bias, int8_activations=int8, out=out[:, columns])
        return out

    def embed(self, parameters: PackedParameters, token_ids: Tensor) -> Tensor:
        """Expand the rows that are asked for."""
        (part,) = parameters.parts
        return packed_embedding(part.weight, token_ids)

    def argmax(self, parameters: PackedParameters, x: Tensor) -> tuple[Tensor, Tensor]:
        """Look for the largest product as the products are made."""
        (part,) = parameters.parts
        return packed_argmax(x, part.weight, norms=parameters.norms, int8_activations=part.int8_activations)

    def draw(
        self, parameters: PackedParameters, x: Tensor, out: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Make no more of the products than the draw goes by."""
        if parameters.norms is None:
            return super().draw(parameters, x, out, **options)
        (part,) = parameters.parts
        return packed_sample(x, part.weight, norms=parameters.norms, logits=out, **options)


def pack_shards(shards: Sequence[Tensor | StoredTensor], weight_format: WeightFormat, in_features: int) -> PackedWeight:
    """Pack shards of a matrix as one weight; those in another dtype than the format's are brought into it.

    Raises:
        CorruptModelFile: if a block has a scale that is NaN or infinite; names the file and the tensor.
    """
    rows = [_rows(tensor, weight_format) for tensor in shards]
    joined = rows[0] if len(rows) == 1 else torch.cat(rows)
    weight = pack_weight(joined.contiguous(), weight_format, in_features=in_features)
    # Packing has put the scales side by side: they are seen there without a second walk through the file.
    if weight_format is WeightFormat.NVFP4 or not has_finite_scales(weight):  # its NaN is packed as 0
        for tensor in shards:
            if isinstance(tensor, StoredTensor):
                tensor.check_scales()
    return weight


def _is_screened(part: PackedPart) -> bool:
    """Return whether a head's products are told apart by norms, which take little beside the weight."""
    weight, format_ = part.weight, part.weight.format
    if part.int8_activations or format_.dtype is not None or format_.has_minimums:
        return False
    return weight.num_bytes >= _BYTES_WORTH_A_NORM * weight.out_features


def _format_of(tensor: Tensor | StoredTensor) -> WeightFormat:
    """Return the format that a tensor is packed in; a type that products do not read becomes fp32."""
    if isinstance(tensor, StoredTensor):
        return BLOCK_FORMATS.get(tensor.type, WeightFormat.F32)
    return _DENSE_FORMATS.get(tensor.dtype, WeightFormat.F32)


def _rows(tensor: Tensor | StoredTensor, weight_format: WeightFormat) -> Tensor:
    if isinstance(tensor, StoredTensor):
        return tensor.as_tensor() if tensor.type in BLOCK_FORMATS else tensor.values()
    return tensor.to(weight_format.dtype)
