"""PackedOnDevice: GGUF's blocks on a GPU as the file stores them, and all other matrices as torch multiplies them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from octavo_engine.quant.base import QuantMethod, Shard, WeightSlot
from octavo_engine.quant.onednn import linear
from octavo_engine.quant.packed import BLOCK_FORMATS, pack_shards
from octavo_engine.quant.unquantized import DenseParameters, Unquantized
from octavo_engine.weights.quantized import QuantizedTensor
from octavo_engine.weights.stored import StoredTensor
from octavo_kernels import PackedWeight, WeightFormat, packed_embedding, packed_linear

DEVICE_FORMATS = MappingProxyType({key: item for key, item in BLOCK_FORMATS.items() if item.parts is None})
"""GGUF's types that Triton reads as they are stored."""


class DevicePart(NamedTuple):
    """Some rows of a matrix, packed or in the dtype of the activations, and the columns of the product they make."""

    weight: PackedWeight | Tensor
    columns: slice


@dataclass(slots=True)
class DeviceParameters:
    """A matrix in the making, and finished.

    dtype: of activations, and of rows that are not packed.
    bias: [out_features] fp32, or None; of a finished matrix without blocks as `dense` has it.
    dense: [out_features, in_features], made when the first shard without blocks comes; rows of others are not filled.
    stored: by the first row, the shards in blocks as they came; emptied by `finish`. Written by the slots alone.
    parts: of a finished matrix with blocks, in the order of its rows.
    """

    in_features: int
    out_features: int
    dtype: torch.dtype
    device: torch.device
    bias: Tensor | None
    dense: DenseParameters | None = None
    stored: dict[int, StoredTensor] = field(default_factory=dict)
    parts: tuple[DevicePart, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes on the device that the weight takes."""
        weights = [part.weight for part in self.parts] if self.dense is None else [self.dense.weight]
        return sum(weight.num_bytes if isinstance(weight, PackedWeight) else weight.nbytes for weight in weights)


class PackedOnDevice(QuantMethod[DeviceParameters]):
    """What serves where Triton does: a matrix with a shard in blocks stays packed, others are `Unquantized`'s.

    Blocks that products do not read (IQ1 to IQ3, TQ, MXFP4 and the like) are expanded to the dtype of the activations.

    Args:
        batch_invariant: as of `Unquantized`.
    """

    def __init__(self, *, batch_invariant: bool = True) -> None:
        self._batch_invariant = batch_invariant
        self._unquantized = Unquantized(batch_invariant=batch_invariant)

    def create(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> DeviceParameters:
        """Allocate the bias; what the weight takes depends on what its slots are filled with."""
        biases = torch.empty(out_features, dtype=torch.float32, device=device) if bias else None
        return DeviceParameters(in_features, out_features, dtype, device, biases)

    def slots(self, parameters: DeviceParameters, shards: Sequence[Shard], prefix: str) -> Iterator[WeightSlot]:
        """Yield `<prefix><shard>.weight` and `.bias`."""
        start = 0
        for shard in shards:
            rows = slice(start, start + shard.num_rows)
            fill = partial(self._fill, parameters, rows)
            yield WeightSlot(f"{prefix}{shard.name}.weight", (shard.num_rows, parameters.in_features), fill)
            if parameters.bias is not None:
                yield WeightSlot.into(f"{prefix}{shard.name}.bias", parameters.bias[rows])
            start = rows.stop

    def finish(self, parameters: DeviceParameters) -> DeviceParameters:
        """Pack what came in blocks, neighbours of one type as one weight; a matrix without blocks is torch's."""
        if parameters.stored:
            parts = tuple(_parts(parameters))
            return replace(parameters, dense=None, stored={}, parts=parts)
        if parameters.parts:
            return parameters
        dense = self._unquantized.finish(_dense(parameters))
        return replace(parameters, dense=dense, bias=dense.bias)

    def finish_table(self, parameters: DeviceParameters) -> DeviceParameters:
        """Pack as for products, since lookups read the same bytes; a matrix without blocks is left as it is."""
        return self.finish(parameters) if parameters.stored else replace(parameters, dense=_dense(parameters))

    def apply(self, parameters: DeviceParameters, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply, in new memory; each part writes its columns."""
        if parameters.dense is not None:
            return self._unquantized.apply(parameters.dense, x, out)
        if len(parameters.parts) == 1:
            ((weight, _),) = parameters.parts
            assert isinstance(weight, PackedWeight)
            return packed_linear(x, weight, parameters.bias)
        out = torch.empty((len(x), parameters.out_features), dtype=x.dtype, device=x.device)
        for weight, columns in parameters.parts:
            bias = None if parameters.bias is None else parameters.bias[columns]
            if isinstance(weight, PackedWeight):
                packed_linear(x, weight, bias, out=out[:, columns])
            else:
                bias = None if bias is None else bias.to(x.dtype)
                out[:, columns] = linear(x, weight, bias, batch_invariant=self._batch_invariant)
        return out

    def embed(self, parameters: DeviceParameters, token_ids: Tensor) -> Tensor:
        """Expand the rows that are asked for, and round them to the dtype of the activations."""
        if parameters.dense is not None:
            return self._unquantized.embed(parameters.dense, token_ids)
        ((weight, _),) = parameters.parts
        assert isinstance(weight, PackedWeight)
        return packed_embedding(weight, token_ids).to(parameters.dtype)

    def argmax(self, parameters: DeviceParameters, x: Tensor) -> tuple[Tensor, Tensor]:
        """Make the product whole, then look for its largest."""
        best, ids = self.apply(parameters, x).float().max(dim=-1)
        return ids, best

    def _fill(self, parameters: DeviceParameters, rows: slice, tensor: Tensor | StoredTensor | QuantizedTensor) -> None:
        """Keep a shard whose blocks are multiplied; copy the values of another one to the device."""
        if isinstance(tensor, StoredTensor) and tensor.type in DEVICE_FORMATS:
            parameters.stored[rows.start] = tensor
            return
        if parameters.dense is None:
            parameters.dense = self._unquantized.create(
                parameters.in_features,
                parameters.out_features,
                bias=False,
                dtype=parameters.dtype,
                device=parameters.device,
            )
        parameters.dense.weight[rows].copy_(tensor if isinstance(tensor, Tensor) else tensor.values())


def _dense(parameters: DeviceParameters) -> DenseParameters:
    """Return the filled weight of a matrix without blocks, with its bias."""
    assert parameters.dense is not None, "a matrix is finished before its slots were filled"
    if parameters.bias is None:
        return parameters.dense
    return parameters.dense._replace(bias=parameters.bias.to(parameters.dtype))


def _parts(parameters: DeviceParameters) -> Iterator[DevicePart]:
    """Yield what a matrix with blocks is made of, in the order of its rows."""
    end = 0
    for weight_format, run in groupby(sorted(parameters.stored.items()), key=lambda item: _run_of(item, parameters)):
        shards = list(run)
        start = shards[0][0]
        if start > end:
            yield _dense_part(parameters, slice(end, start))
        end = shards[-1][0] + shards[-1][1].shape[0]
        weight = _pack([tensor for _, tensor in shards], weight_format[0], parameters)
        yield DevicePart(weight, slice(start, end))
    if end < parameters.out_features:
        yield _dense_part(parameters, slice(end, parameters.out_features))


def _run_of(item: tuple[int, StoredTensor], parameters: DeviceParameters) -> tuple[WeightFormat, int]:
    """Return what neighbours have in common: the format, and how many rows before them are not in blocks."""
    start, tensor = item
    packed_before = sum(other.shape[0] for first, other in parameters.stored.items() if first < start)
    return DEVICE_FORMATS[tensor.type], start - packed_before


def _dense_part(parameters: DeviceParameters, rows: slice) -> DevicePart:
    assert parameters.dense is not None
    return DevicePart(parameters.dense.weight[rows].clone(), rows)


def _pack(shards: Sequence[StoredTensor], weight_format: WeightFormat, parameters: DeviceParameters) -> PackedWeight:
    """Pack rows of blocks where the file is, and move the result: the device never holds both."""
    weight = pack_shards(shards, weight_format, parameters.in_features)
    return replace(weight, data=weight.data.to(parameters.device))
