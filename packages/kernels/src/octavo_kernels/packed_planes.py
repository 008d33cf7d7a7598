"""PlaneLayout: how a packed weight lies whose codes have planes of low and of high bits, and the same in torch.

These are GGUF's types of 5 bits, its K types and those with a table of levels. A block is what shares a scale of its
own, 32 or 256 inputs; it is packed for the 32 outputs of a panel side by side, its parts one after the other::

    block   d f16 | unit of minimums f16 | scales i8 | minimums u8 | codes of each group of 32 inputs
            each part 32 outputs side by side; of scales and minimums one for each group, or for each half of one

A group's codes are rows of 32 words of 32 bits, one per output, as in `packed_weight`: the rows of the low bits, then
those of the high bits. A byte has f = 8 // bits fields; byte b of a word of row i holds those of inputs
4 * (i * f + j) + b, j from 0 on, lowest bits first. (So 4 bits lie as those of q4_0.)

    q5_0    5 bits    d * (code - 16)                  q5_1    5 bits    d * code + m
    q2_k    2 bits    d * scale * code - m * minimum   16 inputs; scale and minimum in 4 bits of one byte each
    q3_k    3 bits    d * scale * (code - 4)           16 inputs
    q4_k    4 bits    d * scale * code - m * minimum   32 inputs
    q5_k    5 bits    the same
    q6_k    6 bits    d * scale * (code - 32)          16 inputs
    iq4_nl  4 bits    d * LEVELS[code]
    iq4_xs  4 bits    d * scale * LEVELS[code]         32 inputs

Products of d and a scale, and of that and a code, are exact in fp32: a value is rounded once at most.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the codes of iq4_nl and iq4_xs mean."""

_PANEL = 32
_GROUP = 32
_HALF = _GROUP // 2


@dataclass(frozen=True, slots=True)
class PlaneLayout:
    """How a format lies.

    num_groups: groups of 32 inputs in a block.
    scales_of_group: scales that d is multiplied by: none, one, or one for each half.
    has_minimum: whether there is a unit of minimums.
    nibble_scales: whether scale and minimum share a byte.
    low_bits, high_bits: of a code.
    zero: the code that means 0.
    stored_bytes: of a block in a file.
    """

    num_groups: int
    scales_of_group: int
    has_minimum: bool
    nibble_scales: bool
    low_bits: int
    high_bits: int
    zero: int
    stored_bytes: int

    @property
    def block_inputs(self) -> int:
        """Inputs of a block."""
        return self.num_groups * _GROUP

    @property
    def num_scales(self) -> int:
        """Scales of a block."""
        return self.num_groups * self.scales_of_group

    @property
    def scale_inputs(self) -> int:
        """Inputs that a scale is for."""
        return _HALF if self.scales_of_group == 2 else _GROUP

    @property
    def part_bytes(self) -> tuple[int, ...]:
        """Bytes of a block's parts: d, the unit of minimums, scales, minimums, low bits and high bits of a group."""
        minimums = self.num_scales if self.has_minimum and not self.nibble_scales else 0
        per_output = (2, 2 * self.has_minimum, self.num_scales, minimums, 4 * self.low_bits, 4 * self.high_bits)
        return tuple(_PANEL * count for count in per_output)

    @property
    def block_bytes(self) -> int:
        """Bytes of a packed block, of 32 outputs."""
        *fixed, low, high = self.part_bytes
        return sum(fixed) + self.num_groups * (low + high)


Q5_0 = PlaneLayout(1, 0, False, False, 4, 1, 16, 22)
Q5_1 = PlaneLayout(1, 0, True, False, 4, 1, 0, 24)
Q2_K = PlaneLayout(8, 2, True, True, 2, 0, 0, 84)
Q3_K = PlaneLayout(8, 2, False, False, 2, 1, 4, 110)
Q4_K = PlaneLayout(8, 1, True, False, 4, 0, 0, 144)
Q5_K = PlaneLayout(8, 1, True, False, 4, 1, 0, 176)
Q6_K = PlaneLayout(8, 2, False, False, 4, 2, 32, 210)
IQ4_NL = PlaneLayout(1, 0, False, False, 4, 0, 0, 18)
IQ4_XS = PlaneLayout(8, 1, False, False, 4, 0, 0, 136)


class Blocks(NamedTuple):
    """Blocks of some rows, taken apart; a file's, or a panel's.

    codes: [..., num_blocks, block_inputs] uint8. d, unit: [..., num_blocks] fp16; unit is None without minimums.
    scales: [..., num_blocks, num_scales] int8. minimums: the same, or None without minimums.
    """

    codes: Tensor
    d: Tensor
    unit: Tensor | None
    scales: Tensor
    minimums: Tensor | None


class GroupValues(NamedTuple):
    """What products multiply: weight = code * d + m.

    codes: [..., num_groups, inputs] fp32, whole numbers. d: [..., num_groups] fp32. m: the same, or None.
    """

    codes: Tensor
    d: Tensor
    m: Tensor | None

    def weights(self) -> Tensor:
        """Return the values: [..., num_groups, inputs] fp32."""
        values = self.codes * self.d[..., None]
        return values if self.m is None else values + self.m[..., None]


def read_stored(rows: Tensor, layout: PlaneLayout) -> Blocks:
    """Take the blocks of a file apart: rows [num_rows, bytes per row] uint8."""
    blocks = rows.reshape(len(rows), -1, layout.stored_bytes)
    return _READERS[layout](blocks)


def write_panels(blocks: Blocks, layout: PlaneLayout, panels: Tensor) -> None:
    """Fill panels [num_panels, num_blocks, block_bytes] uint8 from blocks of rows; zeros follow the last row."""
    *fixed, _, _ = layout.part_bytes
    parts = torch.split(panels, [*fixed, panels.shape[-1] - sum(fixed)], dim=-1)
    shape = (len(panels), _PANEL, panels.shape[1], -1)  # [panel, output, block, ...]

    def fill_up(values: Tensor) -> Tensor:
        missing = len(panels) * _PANEL - len(values)
        return torch.cat([values, values.new_zeros(missing, *values.shape[1:])])

    def put(target: Tensor, values: Tensor) -> None:
        by_output = fill_up(values).view(shape).permute(0, 2, 3, 1)  # [panel, block, ..., output]
        target.copy_(by_output.contiguous().view(torch.uint8).flatten(2))

    put(parts[0], blocks.d)
    if blocks.unit is not None:
        put(parts[1], blocks.unit)
    scales = blocks.scales
    if blocks.minimums is not None and layout.nibble_scales:
        scales = scales | (blocks.minimums << 4).view(torch.int8)
    elif blocks.minimums is not None:
        put(parts[3], blocks.minimums)
    if layout.num_scales:
        put(parts[2], scales)
    codes = fill_up(blocks.codes).view(*shape[:3], layout.num_groups, _GROUP)
    planes = [_write_plane(codes & ((1 << layout.low_bits) - 1), layout.low_bits)]
    if layout.high_bits:
        planes.append(_write_plane(codes >> layout.low_bits, layout.high_bits))
    parts[4].copy_(torch.cat(planes, dim=-1).flatten(2))


def read_panels(panels: Tensor, layout: PlaneLayout) -> Blocks:
    """Take panels [num_panels, num_blocks, block_bytes] apart, by [num_panels, 32 outputs]."""
    *fixed, low_bytes, high_bytes = layout.part_bytes
    parts = torch.split(panels, [*fixed, panels.shape[-1] - sum(fixed)], dim=-1)

    def take(part: Tensor, dtype: torch.dtype) -> Tensor:
        values = _split(part.contiguous().view(dtype), -1, _PANEL)
        return values.permute(0, 3, 1, 2)  # [panel, output, block, ...]

    scales = take(parts[2], torch.int8) if layout.num_scales else panels.new_empty(0, dtype=torch.int8)
    minimums = None
    if layout.nibble_scales:
        scales, minimums = scales & 15, scales.view(torch.uint8) >> 4
    elif layout.has_minimum and layout.num_scales:
        minimums = take(parts[3], torch.uint8)
    groups = _split(parts[4], layout.num_groups, low_bytes + high_bytes)
    codes = _read_plane(groups[..., :low_bytes], layout.low_bits)
    if layout.high_bits:
        codes = codes | _read_plane(groups[..., low_bytes:], layout.high_bits) << layout.low_bits
    unit = take(parts[1], torch.float16)[..., 0] if layout.has_minimum else None
    return Blocks(codes, take(parts[0], torch.float16)[..., 0], unit, scales, minimums)


def group_values(blocks: Blocks, layout: PlaneLayout) -> GroupValues:
    """Return codes as numbers and the scales of their groups, by groups of `scale_inputs`."""
    codes = blocks.codes.float().sub_(layout.zero)
    if layout in (IQ4_NL, IQ4_XS):
        codes = torch.tensor(LEVELS, dtype=torch.float32, device=codes.device)[blocks.codes.long()]
    codes = _split(codes.flatten(-2), -1, layout.scale_inputs)
    d, m = blocks.d.float()[..., None], None
    if layout.num_scales:
        d = d * blocks.scales
    if blocks.unit is not None:
        m = blocks.unit.float()[..., None]
        if blocks.minimums is not None:
            m = -(m * blocks.minimums)
        m = m.flatten(-2)
    return GroupValues(codes, d.flatten(-2), m)


def _split(tensor: Tensor, *sizes: int) -> Tensor:
    return tensor.reshape(*tensor.shape[:-1], *sizes)


def _write_plane(fields: Tensor, bits: int) -> Tensor:
    """Return the bytes of a plane: fields [panel, output, block, group, 32] -> [panel, block, group, bytes] uint8."""
    per_byte = 8 // bits
    rows = _split(fields, -1, per_byte, 4)  # [..., row, field, byte]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=fields.device)
    packed = (rows << shifts[:, None]).sum(dim=-2, dtype=torch.uint8)  # [panel, output, block, group, row, byte]
    return packed.permute(0, 2, 3, 4, 1, 5).flatten(3)


def _read_plane(plane: Tensor, bits: int) -> Tensor:
    """Return the fields of a plane: [panel, block, group, bytes] -> [panel, output, block, block_inputs] uint8."""
    words = _split(plane, -1, _PANEL, 4).permute(0, 4, 1, 2, 3, 5)  # [panel, output, block, group, row, byte]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=plane.device)
    fields = (words[..., None, :] >> shifts[:, None]) & ((1 << bits) - 1)
    return fields.flatten(3)


def bit_fields(packed: Tensor, bits: int, run: int) -> Tensor:
    """Return fields of bytes that come in runs, the lowest bits of a whole run first: [..., bytes] -> [..., fields]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((_split(packed, -1, 1, run) >> shifts[:, None]) & ((1 << bits) - 1)).flatten(-3)


def _half(blocks: Tensor, start: int) -> Tensor:
    return blocks[..., start : start + 2].contiguous().view(torch.float16).squeeze(-1)


def _none(blocks: Tensor) -> Tensor:
    return blocks[..., :0].to(torch.int8)


def _read_q5_0(blocks: Tensor) -> Blocks:
    codes = bit_fields(blocks[..., 6:], 4, 16) | bit_fields(blocks[..., 2:6], 1, 1) << 4
    return Blocks(codes, _half(blocks, 0), None, _none(blocks), None)


def _read_q5_1(blocks: Tensor) -> Blocks:
    codes = bit_fields(blocks[..., 8:], 4, 16) | bit_fields(blocks[..., 4:8], 1, 1) << 4
    return Blocks(codes, _half(blocks, 0), _half(blocks, 2), _none(blocks), None)


def _read_q2_k(blocks: Tensor) -> Blocks:
    both = blocks[..., :16]
    codes = bit_fields(blocks[..., 16:80], 2, 32)
    return Blocks(codes, _half(blocks, 80), _half(blocks, 82), (both & 15).to(torch.int8), both >> 4)


def _read_q3_k(blocks: Tensor) -> Blocks:
    scales = bit_fields(blocks[..., 96:104], 4, 8) | bit_fields(blocks[..., 104:108], 2, 4) << 4
    codes = bit_fields(blocks[..., 32:96], 2, 32) | bit_fields(blocks[..., :32], 1, 32) << 2
    return Blocks(codes, _half(blocks, 108), None, (scales.to(torch.int16) - 32).to(torch.int8), None)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 8 scales and 8 minimums of 6 bits in 12 bytes; the last four of each have their high bits apart."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat([first & 63, third & 15 | first >> 2 & 48], dim=-1)
    minimums = torch.cat([second & 63, third >> 4 | second >> 2 & 48], dim=-1)
    return scales.to(torch.int8), minimums


def _read_q4_k(blocks: Tensor) -> Blocks:
    codes = bit_fields(blocks[..., 16:], 4, 32)
    return Blocks(codes, _half(blocks, 0), _half(blocks, 2), *_six_bits(blocks[..., 4:16]))


def _read_q5_k(blocks: Tensor) -> Blocks:
    codes = bit_fields(blocks[..., 48:], 4, 32) | bit_fields(blocks[..., 16:48], 1, 32) << 4
    return Blocks(codes, _half(blocks, 0), _half(blocks, 2), *_six_bits(blocks[..., 4:16]))


def _read_q6_k(blocks: Tensor) -> Blocks:
    codes = bit_fields(blocks[..., :128], 4, 64) | bit_fields(blocks[..., 128:192], 2, 32) << 4
    return Blocks(codes, _half(blocks, 208), None, blocks[..., 192:208].contiguous().view(torch.int8), None)


def _read_iq4_nl(blocks: Tensor) -> Blocks:
    return Blocks(bit_fields(blocks[..., 2:], 4, 16), _half(blocks, 0), None, _none(blocks), None)


def _read_iq4_xs(blocks: Tensor) -> Blocks:
    scales = bit_fields(blocks[..., 4:8], 4, 1) | bit_fields(blocks[..., 2:4], 2, 1) << 4
    codes = bit_fields(blocks[..., 8:], 4, 16)
    return Blocks(codes, _half(blocks, 0), None, (scales.to(torch.int16) - 32).to(torch.int8), None)


_READERS = MappingProxyType(
    {
        Q5_0: _read_q5_0,
        Q5_1: _read_q5_1,
        Q2_K: _read_q2_k,
        Q3_K: _read_q3_k,
        Q4_K: _read_q4_k,
        Q5_K: _read_q5_k,
        Q6_K: _read_q6_k,
        IQ4_NL: _read_iq4_nl,
        IQ4_XS: _read_iq4_xs,
    }
)
