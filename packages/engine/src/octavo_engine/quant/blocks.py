"""Whole numbers in groups as the blocks of 32 that native products read: by themselves, or with what zeros add."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from octavo_engine.weights.gguf import TensorType
from octavo_engine.weights.grouped_integers import GroupedIntegers
from octavo_engine.weights.quantized import QuantizedTensor
from octavo_engine.weights.stored import StoredTensor
from octavo_kernels import WeightFormat, pack_weight, packed_linear

_BLOCK = 32
_SCALE_BYTES = 2
_TYPES = MappingProxyType({4: TensorType.Q4_0, 8: TensorType.Q8_0})
_FORMATS = MappingProxyType({4: WeightFormat.Q4_0, 8: WeightFormat.Q8_0})
_CHUNK_VALUES = 1 << 22


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
    return StoredTensor(_rows(weight, None).numpy(), _TYPES[weight.bits], weight.shape)


def has_block_product(weight: GroupedIntegers) -> bool:
    """Return whether `BlockProduct` multiplies a weight: its codes fit blocks, and its groups have one size."""
    size, in_features = weight.group_size, weight.shape[1]
    return (size >= in_features or in_features % size == 0) and _fits(weight) and weight.has_even_groups()


def _fits(weight: GroupedIntegers) -> bool:
    """Return whether blocks hold the codes around their middle: of 4 or 8 bits, in whole blocks, by scales of fp16."""
    in_features, size = weight.shape[1], weight.group_size
    if weight.bits not in _TYPES or in_features % _BLOCK or (size % _BLOCK and size < in_features):
        return False
    return torch.equal(weight.scales.half().float(), weight.scales.float())


class BlockProduct:
    """A weight whose blocks are multiplied natively, and what its zeros add; on a CPU, for activations in fp32.

    A value `scale * (code - zero)` is `scale * (code - middle) + scale * (middle - zero)`, both exact in fp32, and the
    second is the same for all inputs of a group. So a product is that of the blocks, plus that of the inputs' sums over
    each group by a small matrix.

    Args:
        weight: as the checkpoint has it; it has a block product.
        int8_activations: whether inputs are rounded to 8 bits, as for GGUF's blocks.
    """

    def __init__(self, weight: GroupedIntegers, *, int8_activations: bool) -> None:
        in_features = weight.shape[1]
        order = None if weight.groups is None else weight.groups.argsort(stable=True)
        self._order = order
        self._int8 = int8_activations
        self._weight = pack_weight(_rows(weight, order), _FORMATS[weight.bits], in_features=in_features)
        middle = 1 << (weight.bits - 1)
        zeros = torch.tensor(weight.zero_point) if weight.zeros is None else weight.zeros
        rest = (weight.scales.float() * (middle - zeros)).T.contiguous()
        self._rest = pack_weight(rest, WeightFormat.F32, in_features=rest.shape[1])
        self.num_bytes = self._weight.num_bytes + self._rest.num_bytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply blocks and sums of groups."""
        if self._order is not None:
            x = x[:, self._order]
        product = packed_linear(x, self._weight, bias, int8_activations=self._int8)
        sums = x.reshape(len(x), self._rest.in_features, -1).sum(dim=-1)
        return product.add_(packed_linear(sums, self._rest))


def _rows(weight: GroupedIntegers, order: Tensor | None) -> Tensor:
    """Return a weight that fits blocks as if its zeros were in the middle: [out_features, bytes per row] uint8.

    `order` is the inputs in the order of their groups, None if they stand so.
    """
    out_features, in_features = weight.shape
    rows = torch.empty((out_features, in_features // _BLOCK, _TYPES[weight.bits].block_bytes), dtype=torch.uint8)
    groups = torch.arange(in_features // _BLOCK) * _BLOCK // weight.group_size
    scales = weight.scales.half().T[:, groups].contiguous()
    rows[..., :_SCALE_BYTES] = scales.view(torch.uint8).view(out_features, -1, _SCALE_BYTES)
    step = max(1, _CHUNK_VALUES // in_features)
    for start in range(0, out_features, step):
        part = slice(start, min(start + step, out_features))
        codes = weight.codes(part)
        codes = (codes if order is None else codes[order]).T.reshape(part.stop - start, -1, _BLOCK)
        rows[part, :, _SCALE_BYTES:] = _nibbles(codes) if weight.bits == 4 else codes ^ (1 << (weight.bits - 1))
    return rows.view(out_features, -1)


def _nibbles(codes: Tensor) -> Tensor:
    """Pack element i with element i + 16 of each block in one byte, low bits first."""
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)
