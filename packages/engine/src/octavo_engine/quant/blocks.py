"""Whole numbers in groups as the blocks of 32 that native products read."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from octavo_engine.weights.gguf import TensorType
from octavo_engine.weights.grouped_integers import GroupedIntegers
from octavo_engine.weights.quantized import QuantizedTensor
from octavo_engine.weights.stored import StoredTensor

_BLOCK = 32
_SCALE_BYTES = 2
_TYPES = MappingProxyType({4: TensorType.Q4_0, 8: TensorType.Q8_0})
_CHUNK_VALUES = 1 << 22
_MOST_GROWTH = 1.05


def as_blocks(weight: QuantizedTensor) -> StoredTensor | None:
    """Return a weight in GGUF's Q4_0 or Q8_0, which mean `scale * (code - 8)` and `scale * number`, if they hold it.

    They do if its codes are of 4 or 8 bits, all zeros are in the middle, groups are made of whole blocks of inputs in
    their order, and every scale is a number of fp16. Its values stay what they are, bit for bit.
    """
    if not isinstance(weight, GroupedIntegers) or weight.groups is not None or not _fits(weight):
        return None
    middle = 1 << (weight.bits - 1)
    is_middle = weight.zero_point == middle if weight.zeros is None else bool((weight.zeros == middle).all())
    if not is_middle:
        return None
    return StoredTensor(_rows(weight).numpy(), _TYPES[weight.bits], weight.shape)


def blocks_are_as_small(weight: GroupedIntegers) -> bool:
    """Return whether blocks, which have a scale of 16 bits each, take at most 5 % more than the groups."""
    code_bits = weight.bits * _BLOCK
    group_bits = 8 * weight.scales.element_size() * _BLOCK / min(weight.group_size, weight.shape[1])
    return code_bits + 8 * _SCALE_BYTES <= _MOST_GROWTH * (code_bits + group_bits)


def _fits(weight: GroupedIntegers) -> bool:
    """Return whether blocks hold the codes around their middle: of 4 or 8 bits, in whole blocks, by scales of fp16."""
    in_features, size = weight.shape[1], weight.group_size
    if weight.bits not in _TYPES or in_features % _BLOCK or (size % _BLOCK and size < in_features):
        return False
    return torch.equal(weight.scales.half().float(), weight.scales.float())


def _rows(weight: GroupedIntegers) -> Tensor:
    """Return a weight that fits blocks: [out_features, bytes per row] uint8."""
    out_features, in_features = weight.shape
    rows = torch.empty((out_features, in_features // _BLOCK, _TYPES[weight.bits].block_bytes), dtype=torch.uint8)
    groups = torch.arange(in_features // _BLOCK) * _BLOCK // weight.group_size
    scales = weight.scales.half().T[:, groups].contiguous()
    rows[..., :_SCALE_BYTES] = scales.view(torch.uint8).view(out_features, -1, _SCALE_BYTES)
    step = max(1, _CHUNK_VALUES // in_features)
    for start in range(0, out_features, step):
        part = slice(start, min(start + step, out_features))
        codes = weight.codes(part).T.reshape(part.stop - start, -1, _BLOCK)
        rows[part, :, _SCALE_BYTES:] = _nibbles(codes) if weight.bits == 4 else codes ^ (1 << (weight.bits - 1))
    return rows.view(out_features, -1)


def _nibbles(codes: Tensor) -> Tensor:
    """Pack element i with element i + 16 of each block in one byte, low bits first."""
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)
