"""ScaledFloats and Float4: weights as numbers of 8 and 4 bits with an exponent, with a scale per block."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo_engine.weights.cut import Cut
from octavo_engine.weights.quantized import ALL, QuantizedTensor, regrouped

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the codes 0 to 7 of 4-bit floats are."""

_MANTISSA_BITS = 23  # of fp32, whose exponent has the bias of these bytes
_LEAST_POWER = 1 << (_MANTISSA_BITS - 1)  # the bits of 2**-127


@dataclass(frozen=True, slots=True)
class ScaledFloats(QuantizedTensor):
    """A matrix of values `scale * code`, computed in fp32.

    codes: [out_features, in_features], a float8 dtype or int8.
    scales: [row blocks, column blocks], a floating dtype, or uint8 for powers of two: 2**(byte - 127); the last blocks
        may be smaller.
    block: rows and columns that share a scale.
    """

    codes: Tensor
    scales: Tensor
    block: tuple[int, int]

    def values(self, rows: slice = ALL) -> Tensor:
        """Return `scale * code`."""
        codes = self.codes[rows].float()
        of_row = torch.arange(self.shape[0], device=codes.device)[rows] // self.block[0]
        scales = _as_numbers(self.scales[of_row])
        if scales.shape[1] > 1:
            scales = scales[:, torch.arange(self.shape[1], device=codes.device) // self.block[1]]
        return codes.mul_(scales)

    def part(self, cut: Cut) -> ScaledFloats:
        """Return some rows or columns; blocks that are cut are made smaller."""
        whole = min(self.block[cut.axis], self.shape[cut.axis])
        size, kept = regrouped(whole, cut.start, cut.stop)
        block = (size, self.block[1]) if cut.axis == 0 else (self.block[0], size)
        scales = self.scales[kept] if cut.axis == 0 else self.scales[:, kept]
        return ScaledFloats(self.shape_of(cut), cut.part(self.codes), scales, block)


@dataclass(frozen=True, slots=True)
class Float4(QuantizedTensor):
    """A matrix of 4-bit floats (E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign), with a scale per group of inputs.

    A value is `code * scale`; with a `divisor` (NVFP4 of compressed-tensors) the scale is divided by it first, with a
    `factor` (ModelOpt's) multiplied. All of it in fp32.

    codes: [out_features, in_features / 2] uint8, two neighbouring inputs in a byte, the first in the low bits.
    scales: [out_features, num_groups], float8, or uint8 for powers of two: 2**(byte - 127).
    """

    group_size: int
    codes: Tensor
    scales: Tensor
    divisor: Tensor | None = None
    factor: Tensor | None = None

    def values(self, rows: slice = ALL) -> Tensor:
        """Return `code * scale`."""
        bytes_ = self.codes[rows]
        codes = torch.stack([bytes_ & 15, bytes_ >> 4], dim=-1).flatten(-2)
        table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
        scales = _as_numbers(self.scales[rows])
        if self.divisor is not None:
            scales = scales / self.divisor
        if self.factor is not None:
            scales = scales * self.factor
        groups = torch.arange(self.shape[1], device=codes.device) // self.group_size
        return table[codes.int()] * scales[:, groups]

    @property
    def column_block(self) -> int:
        """Inputs in a byte."""
        return 2

    def part(self, cut: Cut) -> Float4:
        """Return some rows or columns; groups that are cut are made smaller."""
        shape = self.shape_of(cut)
        if cut.axis == 0:
            return replace(self, shape=shape, codes=cut.part(self.codes), scales=cut.part(self.scales))
        codes = self.codes[:, cut.start // 2 : cut.stop // 2].contiguous()
        size, kept = regrouped(self.group_size, cut.start, cut.stop)
        return replace(self, shape=shape, group_size=size, codes=codes, scales=self.scales[:, kept])


def _as_numbers(scales: Tensor) -> Tensor:
    """Return scales as fp32; bytes are powers of two: 2**(byte - 127) (E8M0 of the OCP microscaling formats)."""
    if scales.dtype != torch.uint8:
        return scales.float()
    exponents = scales.int()
    return torch.where(exponents == 0, _LEAST_POWER, exponents << _MANTISSA_BITS).view(torch.float32)
