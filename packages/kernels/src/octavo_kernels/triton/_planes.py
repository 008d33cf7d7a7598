"""Packed weights inside kernels: where a group of 32 inputs lies, and its codes and scales as numbers.

One form serves all block formats (see `octavo_kernels.packed_weight` and `packed_planes`): q4_0, q4_1 and q8_0 are
blocks of one group whose codes have a single plane of 4 or 8 bits.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803, N806, SIM300
# Triton has no types, and its compile-time parameters are written in capitals.

from types import MappingProxyType

import triton
import triton.language as tl

from octavo_kernels import _check
from octavo_kernels.packed_planes import IQ4_NL, IQ4_XS, LEVELS, PlaneLayout
from octavo_kernels.packed_weight import CODE_OFFSET, GROUP, PANEL, WeightFormat

_ONE_PLANE = MappingProxyType(
    {
        WeightFormat.Q4_0: PlaneLayout(1, 0, False, False, 4, 0, 8, 18),
        WeightFormat.Q4_1: PlaneLayout(1, 0, True, False, 4, 0, 0, 20),
        WeightFormat.Q8_0: PlaneLayout(1, 0, False, False, 8, 0, CODE_OFFSET, 34),
    }
)
_LEVEL_OFFSET = 128
_WORD_BYTES = 4


def plane_layout(format: WeightFormat) -> PlaneLayout:  # noqa: A002  # the field's name
    """Return how a block format's panels lie.

    Raises:
        OptionError: if it has parts, which only the `cpu` backend and the reference multiply.
    """
    _check.option(
        "packed_linear", "weight.format", format.value, format.parts is None, "a format that Triton multiplies"
    )
    return format.planes or _ONE_PLANE[format]


def plane_constants(format: WeightFormat) -> dict[str, int | bool]:  # noqa: A002
    """Return a block format as the kernels' compile-time parameters; offsets in words of 4 bytes."""
    layout = plane_layout(format)
    in_levels = layout in (IQ4_NL, IQ4_XS)
    d, unit, scales, minimums, low, high = layout.part_bytes
    return {
        "NUM_GROUPS": layout.num_groups,
        "SCALES": layout.scales_of_group,
        "MINIMUM": layout.has_minimum,
        "NIBBLES": layout.nibble_scales,
        "LOW": layout.low_bits,
        "HIGH": layout.high_bits,
        "LEVELED": in_levels,
        "ZERO": _LEVEL_OFFSET if in_levels else layout.zero,
        "SCALES_AT": (d + unit) // _WORD_BYTES,
        "CODES_AT": (d + unit + scales + minimums) // _WORD_BYTES,
        "GROUP_WORDS": (low + high) // _WORD_BYTES,
        "BLOCK_WORDS": layout.block_bytes // _WORD_BYTES,
    }


def _level_word(first: int) -> int:
    """Return four levels, made unsigned, in one word of 32 bits with a sign."""
    word = sum((LEVELS[first + place] + _LEVEL_OFFSET) << (8 * place) for place in range(4))
    return word - (1 << 32) if word >= 1 << 31 else word


_LEVELS_0, _LEVELS_4, _LEVELS_8, _LEVELS_12 = (tl.constexpr(_level_word(first)) for first in (0, 4, 8, 12))
_PANEL = tl.constexpr(PANEL)
_GROUP = tl.constexpr(GROUP)


@triton.jit
def _fields(word_ptrs, mask, PART: tl.constexpr, BITS: tl.constexpr, INPUTS: tl.constexpr):
    """Return fields of a group's plane, of the PART-th run of INPUTS inputs: [INPUTS, outputs] int32.

    word_ptrs: [outputs], the first row of the plane. A word has 32 // BITS neighbouring inputs, four side by side.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    FIELDS: tl.constexpr = PER_WORD if PER_WORD < INPUTS else INPUTS
    rows = PART * INPUTS // PER_WORD + tl.arange(0, INPUTS // FIELDS)
    words = tl.load(word_ptrs[None, :] + rows[:, None] * _PANEL, mask=mask[None, :], other=0)
    fields = PART * INPUTS % PER_WORD + tl.arange(0, FIELDS)
    shifts = fields % 4 * 8 + fields // 4 * BITS
    codes = (words[:, None, :] >> shifts[None, :, None]) & ((1 << BITS) - 1)
    return tl.reshape(codes, [INPUTS, word_ptrs.shape[0]])


@triton.jit
def _as_numbers(codes, BITS: tl.constexpr, ZERO: tl.constexpr, DTYPE: tl.constexpr):
    """Return codes less the code of zero in DTYPE, exact.

    A code becomes a number by standing in the last bits of a power of two: cheaper than a conversion.
    """
    if DTYPE == tl.float16:
        return (codes | 0x6400).to(tl.int16).to(DTYPE, bitcast=True) - (1024.0 + ZERO)
    if DTYPE == tl.bfloat16 and BITS < 8:
        return (codes | 0x4300).to(tl.int16).to(DTYPE, bitcast=True) - (128.0 + ZERO)
    return ((codes | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + ZERO)).to(DTYPE)


@triton.jit
def group_numbers(
    word_ptrs, mask, PART: tl.constexpr, INPUTS: tl.constexpr, DTYPE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, LEVELED: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Return what the codes of part of a group mean without their scale: [INPUTS, outputs] in DTYPE, whole numbers.

    word_ptrs: [outputs], the first word of the group's codes of each output.
    """
    codes = _fields(word_ptrs, mask, PART, LOW, INPUTS)
    if HIGH > 0:
        codes |= _fields(word_ptrs + LOW * _PANEL, mask, PART, HIGH, INPUTS) << LOW
    if LEVELED:
        low = tl.where(codes < 4, _LEVELS_0, _LEVELS_4)
        high = tl.where(codes < 12, _LEVELS_8, _LEVELS_12)
        codes = (tl.where(codes < 8, low, high) >> (codes % 4 * 8)) & 255
    return _as_numbers(codes, 8 if LEVELED else LOW + HIGH, ZERO, DTYPE)


@triton.jit
def group_scales(
    half_ptrs, byte_ptrs, mask, place,
    NUM_GROUPS: tl.constexpr, PART: tl.constexpr, SCALES: tl.constexpr, MINIMUM: tl.constexpr, NIBBLES: tl.constexpr,
    SCALES_AT: tl.constexpr,
):  # fmt: skip
    """Return d and m of part of a group, [outputs] fp32: a weight is d * number + m. m is 0 without minimums.

    half_ptrs, byte_ptrs: [outputs], each output's first place in its block. place: of the group in the block.
    """
    d = tl.load(half_ptrs, mask=mask, other=0.0).to(tl.float32)
    m = tl.zeros_like(d)
    if MINIMUM:
        m = tl.load(half_ptrs + _PANEL, mask=mask, other=0.0).to(tl.float32)
    if SCALES > 0:
        scale_ptrs = byte_ptrs + SCALES_AT * 4 + (place * SCALES + PART) * _PANEL
        scale = tl.load(scale_ptrs, mask=mask, other=0).to(tl.int32)
        if MINIMUM:
            if NIBBLES:
                minimum = (scale >> 4) & 15
            else:
                minimum = tl.load(scale_ptrs + NUM_GROUPS * SCALES * _PANEL, mask=mask, other=0).to(tl.int32)
            m = -(m * minimum.to(tl.float32))
        if NIBBLES:
            scale = scale & 15
        d = d * scale.to(tl.float32)
    return d, m
