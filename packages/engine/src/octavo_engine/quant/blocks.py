"""as_blocks: whole numbers in groups as the blocks of 32 that native products read, where these hold them exactly."""

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


def as_blocks(weight: QuantizedTensor) -> StoredTensor | None:
    """Return a weight in GGUF's Q4_0 or Q8_0, which mean `scale * (code - 8)` and `scale * number`, if they hold it.

    They do if its codes are of 4 or 8 bits, all zeros are in the middle, groups are made of whole blocks of inputs in
    their order, and every scale is a number of fp16. Its values stay what they are, bit for bit.
    """
    if not isinstance(weight, GroupedIntegers) or weight.bits not in _TYPES or weight.groups is not None:
        return None
    out_features, in_features = weight.shape
    if in_features % _BLOCK or (weight.group_size % _BLOCK and weight.group_size < in_features):
        return None
    middle = 1 << (weight.bits - 1)
    is_middle = weight.zero_point == middle if weight.zeros is None else bool((weight.zeros == middle).all())
    halves = weight.scales.half()
    if not is_middle or not torch.equal(halves.float(), weight.scales.float()):
        return None
    kind = _TYPES[weight.bits]
    rows = torch.empty((out_features, in_features // _BLOCK, kind.block_bytes), dtype=torch.uint8)
    groups = torch.arange(in_features // _BLOCK) * _BLOCK // weight.group_size
    rows[..., :_SCALE_BYTES] = halves.T[:, groups].contiguous().view(torch.uint8).view(out_features, -1, _SCALE_BYTES)
    step = max(1, _CHUNK_VALUES // in_features)
    for start in range(0, out_features, step):
        part = slice(start, min(start + step, out_features))
        codes = weight.codes(part).T.reshape(part.stop - start, -1, _BLOCK)
        rows[part, :, _SCALE_BYTES:] = _nibbles(codes) if weight.bits == 4 else codes ^ middle
    return StoredTensor(rows.view(out_features, -1).numpy(), kind, weight.shape)


def _nibbles(codes: Tensor) -> Tensor:
    """Pack element i with element i + 16 of each block in one byte, low bits first."""
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)
