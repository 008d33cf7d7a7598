"""PartLayout: how a packed weight lies that has codes of no planes, or no f16 scale of its own, and the same in torch.

These are GGUF's 4-bit floats, Q8_K, the ternary types and the IQ types of 1 to 3 bits, whose codes are numbers of a
grid's points (see `grids`) and signs. A block is packed for the 32 outputs of a panel: of each word that one output
has, of 1, 2 or 4 bytes, those of the 32 outputs lie side by side. Words of a block, by their bytes::

    mxfp4    scale e8m0 | 4 x 4                     codes of 4 bits in rows of words as those of q4_0, of 32 inputs
    nvfp4    4 scales e4m3, of 16 inputs | 8 x 4    the same, of 64 inputs
    q8_k     d f32 | 64 x 4                         code + 128 of 4 inputs in a word
    tq2_0    d f16 | 16 x 4                         2 bits, in rows of words as those of q2_k
    tq1_0    d f16 | 13 x 4                         a byte has base-3 digits of inputs 20 i + b, 20 i + 4 + b, ...
    iq2_xxs  d f16 | 8 x (points 4 | signs and scale 4)
    iq2_xs   d f16 | 8 x 1 of two scales | 8 x (points 4 | signs and ninth bits of points 4)
    iq2_s    d f16 | 8 x 1 of two scales | 8 x (points 4 | signs 4 | high bits of points 1)
    iq3_xxs  d f16 | 8 x (points 4, 4 | signs and scale 4)
    iq3_s    d f16 | 8 x (2 scale + 1) | 8 x (points 4, 4 | signs 4 | high bits of points 1)
    iq1_s    d f16 | 8 x (points 4 | high bits, scale, delta 2)
    iq1_m    d f16 | 8 x 1 of two (2 scale + 1) | 8 x (points 4 | high bits and deltas 2)

Values are those of the file, bit for bit: d times a scale, and that times a code, are exact in fp32 or rounded once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from octavo_kernels import packed_planes
from octavo_kernels.grids import (
    IQ1_GRID,
    IQ2_S_GRID,
    IQ2_XS_GRID,
    IQ2_XXS_GRID,
    IQ3_S_GRID,
    IQ3_XXS_GRID,
    Grid,
    grid_points,
)
from octavo_kernels.packed_planes import GroupValues, PlaneLayout, bit_fields

_PANEL = 32
_GROUP = 32
_FLOAT_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the values of e2m1


@dataclass(frozen=True, slots=True, eq=False)
class PartLayout:
    """How a format lies.

    name: of the `WeightFormat`. num_groups: groups of 32 inputs in a block. stored_bytes: of a block in a file.
    words: bytes of each word that an output has of a block, in their order.
    pack: turns blocks of a file [..., stored_bytes] into their words' bytes [..., sum of words], both uint8.
    values: turns these bytes into codes [..., num_scales, inputs] and scales [..., num_scales], both fp32.
    grid: that codes are points of, or None.
    """

    name: str
    num_groups: int
    stored_bytes: int
    words: tuple[int, ...]
    pack: Callable[[Tensor], Tensor]
    values: Callable[[Tensor], tuple[Tensor, Tensor]]
    grid: Grid | None = None

    @property
    def block_inputs(self) -> int:
        """Inputs of a block."""
        return self.num_groups * _GROUP

    @property
    def block_bytes(self) -> int:
        """Bytes of a packed block, of 32 outputs."""
        return _PANEL * sum(self.words)


def fill_panels(rows: Tensor, layout: PlaneLayout | PartLayout, panels: Tensor) -> None:
    """Fill panels [num_panels, num_blocks, block_bytes] uint8 from rows [num_rows, bytes per row] of a file.

    What follows the last row is zeros, whatever was there.
    """
    if isinstance(layout, PlaneLayout):
        return packed_planes.write_panels(packed_planes.read_stored(rows, layout), layout, panels)
    packed = layout.pack(rows.reshape(len(rows), -1, layout.stored_bytes))
    filled = packed.new_zeros(len(panels) * _PANEL, *packed.shape[1:])
    filled[: len(packed)] = packed
    by_block = filled.view(len(panels), _PANEL, panels.shape[1], -1).transpose(1, 2)  # [panel, block, output, byte]
    for start, size in _places(layout):
        panels[..., _PANEL * start : _PANEL * (start + size)] = by_block[..., start : start + size].flatten(2)
    return None


def panel_values(panels: Tensor, layout: PlaneLayout | PartLayout) -> GroupValues:
    """Return the values of panels [num_panels, num_blocks, block_bytes] by [num_panels, 32 outputs]."""
    if isinstance(layout, PlaneLayout):
        return packed_planes.group_values(packed_planes.read_panels(panels, layout), layout)
    words = [
        panels[..., _PANEL * start : _PANEL * (start + size)].unflatten(-1, (_PANEL, size))
        for start, size in _places(layout)
    ]
    codes, d = layout.values(torch.cat(words, dim=-1).transpose(1, 2))
    return GroupValues(codes.flatten(2, 3), d.flatten(2), None)


@cache
def native_grid(layout: PartLayout) -> Tensor | None:
    """Return a grid as native code reads it: [num_points, num_dims] uint8, made once; None without a grid.

    Coordinates of IQ2 and IQ3 are as they are, without signs; of IQ1 they are 8 * coordinate + 15.
    """
    if layout.grid is None:
        return None
    points = grid_points(layout.grid)
    return (points * 8 + 15 if layout.grid is IQ1_GRID else points).to(torch.uint8).contiguous()


def _places(layout: PartLayout) -> list[tuple[int, int]]:
    """Return where each word of an output begins among its bytes, and its size."""
    return list(zip(accumulate(layout.words, initial=0), layout.words, strict=False))


# ---- fields ---------------------------------------------------------------------------------------------------------


def _float16(halves: Tensor) -> Tensor:
    """Return the number in bytes [..., 2]: [..., 1] fp32."""
    return halves.contiguous().view(torch.float16).float()


def _integer(packed: Tensor) -> Tensor:
    """Return bytes [..., size], lowest first, as int64 [...]."""
    return (packed.long() << torch.arange(0, 8 * packed.shape[-1], 8, device=packed.device)).sum(dim=-1)


def _bytes(numbers: Tensor, size: int) -> Tensor:
    """Return numbers [...] as bytes [..., size] uint8, lowest first."""
    return (numbers[..., None] >> torch.arange(0, 8 * size, 8, device=numbers.device) & 255).to(torch.uint8)


def _bits(numbers: Tensor, starts: range, count: int) -> Tensor:
    """Return `count` bits of numbers [...] from each start on: [..., len(starts)]."""
    return numbers.long()[..., None] >> torch.tensor(list(starts), device=numbers.device) & ((1 << count) - 1)


def _in_groups(*parts: Tensor) -> Tensor:
    """Put parts [..., 8 * size] side by side, group by group of 8."""
    return torch.cat([part.unflatten(-1, (8, -1)) for part in parts], dim=-1).flatten(-2)


def _plane(codes: Tensor, bits: int) -> Tensor:
    """Return codes [..., inputs] as bytes of rows of words, as many inputs to a byte as fit."""
    rows = codes.unflatten(-1, (-1, 8 // bits, 4))  # [..., row, field, byte]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    packed: Tensor = (rows << shifts[:, None]).sum(dim=-2, dtype=torch.uint8).flatten(-2)
    return packed


def _codes(plane: Tensor, bits: int) -> Tensor:
    """Return what `_plane` was given, in groups: [..., groups, 32] fp32."""
    rows = plane.unflatten(-1, (-1, 1, 4))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=plane.device)
    codes: Tensor = (rows >> shifts[:, None] & ((1 << bits) - 1)).flatten(-3).unflatten(-1, (-1, _GROUP)).float()
    return codes


# ---- floats of 4 bits, whole numbers, digits ------------------------------------------------------------------------


def _levels(codes: Tensor) -> Tensor:
    return torch.tensor(_FLOAT_LEVELS, dtype=torch.float32, device=codes.device)[codes.long()]


def _pack_mxfp4(blocks: Tensor) -> Tensor:
    return torch.cat([blocks[..., :1], _plane(bit_fields(blocks[..., 1:], 4, 16), 4)], dim=-1)


def _mxfp4_values(words: Tensor) -> tuple[Tensor, Tensor]:
    exponents = words[..., :1].long() - 128
    return _levels(_codes(words[..., 1:], 4)), torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)


def _pack_nvfp4(blocks: Tensor) -> Tensor:
    scales = blocks[..., :4]
    scales = torch.where(scales == 0x7F, 0, scales)  # which the file means by it
    return torch.cat([scales, _plane(bit_fields(blocks[..., 4:], 4, 8), 4)], dim=-1)


def _nvfp4_values(words: Tensor) -> tuple[Tensor, Tensor]:
    numbers = words[..., :4].long()
    exponents, mantissas = numbers >> 3 & 15, (numbers & 7).float()
    normal = torch.ldexp(1 + mantissas / 8, exponents - 8)
    d = torch.where(exponents == 0, mantissas * 2.0**-10, normal)
    return _levels(_codes(words[..., 4:], 4)).unflatten(-1, (2, -1)).flatten(-3, -2), d


def _pack_q8_k(blocks: Tensor) -> Tensor:
    return torch.cat([blocks[..., :4], blocks[..., 4:260] ^ 128], dim=-1)


def _q8_k_values(words: Tensor) -> tuple[Tensor, Tensor]:
    d = words[..., :4].contiguous().view(torch.float32)
    return _codes(words[..., 4:], 8) - 128, d.expand(*d.shape[:-1], 8)


def _pack_tq2_0(blocks: Tensor) -> Tensor:
    return torch.cat([blocks[..., 64:], _plane(bit_fields(blocks[..., :64], 2, 32), 2)], dim=-1)


def _tq2_0_values(words: Tensor) -> tuple[Tensor, Tensor]:
    d = _float16(words[..., :2])
    return _codes(words[..., 2:], 2) - 1, d.expand(*d.shape[:-1], 8)


def _digits(packed: Tensor, count: int) -> Tensor:
    """Return the leading digits, base 3, of bytes that stand for fractions of 256: [..., count, bytes]."""
    powers = 3 ** torch.arange(count, device=packed.device)
    return (packed.long()[..., None, :] * powers[:, None] & 255) * 3 >> 8


def _pack_tq1_0(blocks: Tensor) -> Tensor:
    runs = ((0, 32, 5), (32, 48, 5), (48, 52, 4))
    digits = torch.cat([_digits(blocks[..., start:stop], count).flatten(-2) for start, stop, count in runs], dim=-1)
    rows = torch.nn.functional.pad(digits, (0, 4)).unflatten(-1, (13, 5, 4))
    powers = 3 ** torch.arange(4, -1, -1, device=blocks.device)
    numbers = (rows * powers[:, None]).sum(dim=-2)
    packed = ((numbers * 256 + 242) // 243).to(torch.uint8)
    return torch.cat([blocks[..., 52:], packed.flatten(-2)], dim=-1)


def _tq1_0_values(words: Tensor) -> tuple[Tensor, Tensor]:
    digits = _digits(words[..., 2:].unflatten(-1, (13, 4)), 5).flatten(-3)[..., :256]
    d = _float16(words[..., :2])
    return digits.unflatten(-1, (8, _GROUP)).float() - 1, d.expand(*d.shape[:-1], 8)


# ---- points of grids ------------------------------------------------------------------------------------------------


def _points(grid: Grid, indices: Tensor) -> Tensor:
    """Return coordinates of points: [..., groups, points] -> [..., groups, 32] fp32."""
    return grid_points(grid).to(indices.device)[indices].flatten(-2).float()


def _signed(points: Tensor, signs: Tensor) -> Tensor:
    """Change the signs of points [..., 32] where bits of signs [..., 4] int64 are set, 8 in a number."""
    return torch.where(_bits(signs, range(8), 1).flatten(-2).bool(), -points, points)


def _sevens(numbers: Tensor) -> Tensor:
    """Return four times eight signs of words of 28 bits: the last of eight makes the number of minus signs even."""
    sevens = _bits(numbers, range(0, 28, 7), 7)
    return sevens | (_bits(sevens, range(7), 1).sum(dim=-1) & 1) << 7


def _halves(codes: Tensor) -> Tensor:
    """Cut groups of 32 in two: [..., 8, 32] -> [..., 16, 16]."""
    halves: Tensor = codes.unflatten(-1, (2, -1)).flatten(-3, -2)
    return halves


def _nibbles(scales: Tensor) -> Tensor:
    return bit_fields(scales, 4, 1).float()


def _iq2_xxs_values(words: Tensor) -> tuple[Tensor, Tensor]:
    groups = words[..., 2:].unflatten(-1, (8, 8))
    numbers = _integer(groups[..., 4:])
    codes = _signed(_points(IQ2_XXS_GRID, groups[..., :4].long()), _sevens(numbers))
    return codes, _float16(words[..., :2]) * ((numbers >> 28) + 0.5) * 0.25


def _pack_iq2_xs(blocks: Tensor) -> Tensor:
    points = _integer(blocks[..., 2:66].unflatten(-1, (8, 4, 2)))
    place = torch.arange(4, device=blocks.device)
    numbers = (points >> 9 << 7 * place | (points >> 8 & 1) << 28 + place).sum(dim=-1)
    low = (points & 255).to(torch.uint8).flatten(-2)
    groups = _in_groups(low, _bytes(numbers, 4).flatten(-2))
    return torch.cat([blocks[..., :2], blocks[..., 66:], groups], dim=-1)


def _iq2_xs_values(words: Tensor) -> tuple[Tensor, Tensor]:
    groups = words[..., 10:].unflatten(-1, (8, 8))
    numbers = _integer(groups[..., 4:])
    indices = groups[..., :4].long() | _bits(numbers, range(28, 32), 1) << 8
    codes = _signed(_points(IQ2_XS_GRID, indices), _sevens(numbers))
    return _halves(codes), _float16(words[..., :2]) * (_nibbles(words[..., 2:10]) + 0.5) * 0.25


def _pack_iq2_s(blocks: Tensor) -> Tensor:
    groups = _in_groups(blocks[..., 2:34], blocks[..., 34:66], blocks[..., 66:74])
    return torch.cat([blocks[..., :2], blocks[..., 74:], groups], dim=-1)


def _iq2_s_values(words: Tensor) -> tuple[Tensor, Tensor]:
    groups = words[..., 10:].unflatten(-1, (8, 9))
    indices = groups[..., :4].long() | _bits(groups[..., 8], range(0, 8, 2), 2) << 8
    codes = _signed(_points(IQ2_S_GRID, indices), groups[..., 4:8].long())
    return _halves(codes), _float16(words[..., :2]) * (_nibbles(words[..., 2:10]) + 0.5) * 0.25


def _pack_iq3_xxs(blocks: Tensor) -> Tensor:
    return torch.cat([blocks[..., :2], _in_groups(blocks[..., 2:66], blocks[..., 66:])], dim=-1)


def _iq3_xxs_values(words: Tensor) -> tuple[Tensor, Tensor]:
    groups = words[..., 2:].unflatten(-1, (8, 12))
    numbers = _integer(groups[..., 8:])
    codes = _signed(_points(IQ3_XXS_GRID, groups[..., :8].long()), _sevens(numbers))
    return codes, _float16(words[..., :2]) * ((numbers >> 28) + 0.5) * 0.5


def _pack_iq3_s(blocks: Tensor) -> Tensor:
    scales = 2 * bit_fields(blocks[..., 106:], 4, 1) + 1
    groups = _in_groups(blocks[..., 2:66], blocks[..., 74:106], blocks[..., 66:74])
    return torch.cat([blocks[..., :2], scales, groups], dim=-1)


def _iq3_s_values(words: Tensor) -> tuple[Tensor, Tensor]:
    groups = words[..., 10:].unflatten(-1, (8, 13))
    indices = groups[..., :8].long() | _bits(groups[..., 12], range(8), 1) << 8
    codes = _signed(_points(IQ3_S_GRID, indices), groups[..., 8:12].long())
    return codes, _float16(words[..., :2]) * words[..., 2:10]


def _ternary(indices: Tensor, minus: Tensor) -> Tensor:
    """Return 8 times the coordinates of IQ1's points, and 1 more, or less where `minus` [..., points] is set."""
    points = _points(IQ1_GRID, indices).unflatten(-1, (4, 8)) * 8
    moved: Tensor = (points + (1 - 2 * minus[..., None])).flatten(-2)
    return moved


def _pack_iq1_s(blocks: Tensor) -> Tensor:
    return torch.cat([blocks[..., :2], _in_groups(blocks[..., 2:34], blocks[..., 34:])], dim=-1)


def _iq1_s_values(words: Tensor) -> tuple[Tensor, Tensor]:
    groups = words[..., 2:].unflatten(-1, (8, 6))
    numbers = _integer(groups[..., 4:])
    indices = groups[..., :4].long() | _bits(numbers, range(0, 12, 3), 3) << 8
    minus = (numbers >> 15)[..., None].expand(*numbers.shape, 4)
    return _ternary(indices, minus), _float16(words[..., :2]) * (2 * (numbers >> 12 & 7) + 1) * 0.125


def _pack_iq1_m(blocks: Tensor) -> Tensor:
    numbers = _integer(blocks[..., 48:].unflatten(-1, (4, 2)))
    d = (numbers >> 12 << torch.arange(0, 16, 4, device=blocks.device)).sum(dim=-1)
    scales = 2 * _bits(numbers, range(0, 12, 3), 3).unflatten(-1, (2, 2)).flatten(-3, -2) + 1  # [..., group, half]
    both = (scales[..., 0] | scales[..., 1] << 4).to(torch.uint8)
    groups = _in_groups(blocks[..., :32], blocks[..., 32:48])
    return torch.cat([_bytes(d, 2), both, groups], dim=-1)


def _iq1_m_values(words: Tensor) -> tuple[Tensor, Tensor]:
    groups = words[..., 10:].unflatten(-1, (8, 6))
    fours = _bits(_integer(groups[..., 4:]), range(0, 16, 4), 4)
    codes = _ternary(groups[..., :4].long() | (fours & 7) << 8, fours >> 3)
    return _halves(codes), _float16(words[..., :2]) * _nibbles(words[..., 2:10]) * 0.125


def _as_it_is(blocks: Tensor) -> Tensor:
    return blocks


LAYOUTS = (
    PartLayout("MXFP4", 1, 17, (1, *[4] * 4), _pack_mxfp4, _mxfp4_values),
    PartLayout("NVFP4", 2, 36, (*[1] * 4, *[4] * 8), _pack_nvfp4, _nvfp4_values),
    PartLayout("Q8_K", 8, 292, (4, *[4] * 64), _pack_q8_k, _q8_k_values),
    PartLayout("TQ2_0", 8, 66, (2, *[4] * 16), _pack_tq2_0, _tq2_0_values),
    PartLayout("TQ1_0", 8, 54, (2, *[4] * 13), _pack_tq1_0, _tq1_0_values),
    PartLayout("IQ2_XXS", 8, 66, (2, *[4, 4] * 8), _as_it_is, _iq2_xxs_values, IQ2_XXS_GRID),
    PartLayout("IQ2_XS", 8, 74, (2, *[1] * 8, *[4, 4] * 8), _pack_iq2_xs, _iq2_xs_values, IQ2_XS_GRID),
    PartLayout("IQ2_S", 8, 82, (2, *[1] * 8, *[4, 4, 1] * 8), _pack_iq2_s, _iq2_s_values, IQ2_S_GRID),
    PartLayout("IQ3_XXS", 8, 98, (2, *[4, 4, 4] * 8), _pack_iq3_xxs, _iq3_xxs_values, IQ3_XXS_GRID),
    PartLayout("IQ3_S", 8, 110, (2, *[1] * 8, *[4, 4, 4, 1] * 8), _pack_iq3_s, _iq3_s_values, IQ3_S_GRID),
    PartLayout("IQ1_S", 8, 50, (2, *[4, 2] * 8), _pack_iq1_s, _iq1_s_values, IQ1_GRID),
    PartLayout("IQ1_M", 8, 56, (2, *[1] * 8, *[4, 2] * 8), _pack_iq1_m, _iq1_m_values, IQ1_GRID),
)
"""Every format with parts, by its name."""
