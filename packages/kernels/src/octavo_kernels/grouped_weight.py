"""GroupedWeight: codes of 2, 3, 4 or 8 bits with a scale per group of inputs, as Hugging Face's formats have them.

A value is, each operation rounded to fp32::

    (level(code) + middle - zero) * scale       whole numbers have zeros; without them middle - zero is 0

A level is one of up to 16 in a table, a whole number of 8 bits, or a float of 8 bits (E4M3). A scale is a number of 32
or 16 bits, an E4M3 float, a power of two (E8M0), or a byte that is quantised in turn. Products may end with one factor
for all.

`data` begins with a header of 256 bytes (`cpu/csrc/grouped.h` draws it), which says how the rest lies: the order of
inputs, what quantised scales need, and the panels of 32 outputs, one after the other, each with its codes, then its
scales, then its zeros, [num_groups, 32]. Inputs are filled up to a multiple of 32. Of the codes of a panel::

    4, 2 bits   words of 32 bits, one per output side by side; a word's fields are neighbouring inputs, lowest first
    3 bits      for every 32 inputs two words of the codes' low two bits, then a word of their high bits
    8 bits      for every input 32 bytes, one per output
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from octavo_kernels.packed_weight import PANEL


class CodeKind(IntEnum):
    """What codes are; the numbers are the native library's."""

    TABLE_4 = 0
    TABLE_3 = 1
    TABLE_2 = 2
    INT8 = 3
    E4M3 = 4

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (4, 3, 2, 8, 8)[self]


class ScaleKind(IntEnum):
    """What scales are; the numbers are the native library's."""

    F32 = 0
    F16 = 1
    BF16 = 2
    E8M0 = 3
    E4M3 = 4
    NESTED = 5


class ZeroKind(IntEnum):
    """How zeros are stored; the numbers are the native library's."""

    NONE = 0
    NIBBLES = 1
    BYTES = 2
    SHORTS = 3


class Finish(IntEnum):
    """What products undergo at last; the numbers are the native library's."""

    NONE = 0
    TIMES = 1
    OVER = 2


TABLES = MappingProxyType({4: CodeKind.TABLE_4, 3: CodeKind.TABLE_3, 2: CodeKind.TABLE_2})
"""The kind of codes of few bits."""


@dataclass(frozen=True, slots=True)
class NestedScales:
    """Scales that are quantised in turn (QLoRA, arXiv 2305.14314): table[byte] * outer[index // size] + offset.

    The index counts the weight's scales row after row.

    codes: [out_features, num_groups] uint8. table: [256] fp32. outer: [at least num_scales / size] fp32.
    size: scales that share an outer one, a power of two.
    """

    codes: Tensor
    table: Tensor
    outer: Tensor
    size: int
    offset: float

    def values(self) -> Tensor:
        """Return the scales: [out_features, num_groups] fp32."""
        index = torch.arange(self.codes.numel()).view(self.codes.shape) // self.size
        return self.table[self.codes.int()] * self.outer[index] + self.offset


@dataclass(frozen=True, slots=True)
class GroupedCodes:
    """A weight in codes, as `pack_grouped` takes it.

    codes: [out_features, in_features]: uint8, of fields of `bits` bits; int8; or float8_e4m3fn without NaN.
    scales: [out_features, num_groups] fp32, fp16, bf16, float8_e4m3fn, or uint8, which means 2**(byte - 127).
    group_size: neighbouring inputs that share a scale, or in_features and more for one scale per output; the last group
        may be smaller.
    bits: of a code: 2, 3, 4 or 8.
    levels: [2**bits] fp32, finite, what a code of fewer than 8 bits stands for; codes of 8 bits stand for themselves.
    zeros: [out_features, num_groups] whole numbers from 0 on, which, less `middle`, levels are lowered by; or None.
    order: [in_features], which input stands at each place of codes; None if they stand as they come.
    finish, factor: what every value, or with scales in E4M3 every scale, is multiplied by or divided by in fp32.
    """

    codes: Tensor
    scales: Tensor | NestedScales
    group_size: int
    bits: int
    levels: Tensor | None = None
    zeros: Tensor | None = None
    middle: int = 0
    order: Tensor | None = None
    finish: Finish = Finish.NONE
    factor: float = 1.0

    @property
    def kind(self) -> CodeKind:
        """What the codes are."""
        if self.bits < 8:
            return TABLES[self.bits]
        return CodeKind.INT8 if self.codes.dtype == torch.int8 else CodeKind.E4M3


class GroupedLayout(NamedTuple):
    """The header, field by field as in `cpu/csrc/grouped.h`; places count bytes."""

    codes: CodeKind
    scales: ScaleKind
    zeros: ZeroKind
    finish: Finish
    padded_inputs: int
    group_inputs: int
    num_groups: int
    panels_at: int
    panel_bytes: int
    scales_at: int
    zeros_at: int
    order_at: int
    nested_table_at: int
    nested_scales_at: int
    nested_shift: int
    nested_offset: float
    factor: float
    middle: float
    unused: float
    table: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """A weight [out_features, in_features], packed by `pack_grouped`; written by nobody afterwards.

    data: [num_bytes] uint8, contiguous, beginning at a multiple of 64 bytes; laid out as the module and `layout` say.
    """

    data: Tensor
    layout: GroupedLayout
    out_features: int
    in_features: int

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the weight takes."""
        return self.data.numel()

    @property
    def num_panels(self) -> int:
        """Panels of 32 outputs, the last one filled up."""
        return -(-self.out_features // PANEL)

    def panels(self) -> Tensor:
        """Return a view of the panels: [num_panels, panel_bytes] uint8."""
        return self.data[self.layout.panels_at :].view(self.num_panels, self.layout.panel_bytes)
